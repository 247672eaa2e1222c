"""Back ends of prompts behind the one seam: numbers in, images out, each prompt encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sfd_deploy.errors import PromptError
from sfd_deploy.latents import Latents
from sfd_deploy.runtime import NotRunnableHereError, open_runtime, open_text_runtime
from sfd_deploy.runtime.seam import draw_all
from sfd_deploy.runtime.text import EncodedPrompts
from sfd_deploy.runtime.trt import RTX, gpu_capability
from tests.export.text_runs import PROMPTS, exported_text_run
from tests.text_world import Layout

LATENTS = Latents.of_stream("audit", 0, 0, 7)
NUMBERS = np.arange(7)


class Recorder:
    """Encodes a text as its length, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[[len(text)]] for text in texts], np.float32)


def test_each_prompt_is_encoded_once_and_only_when_it_is_asked_for():
    encode = Recorder()
    prompts = EncodedPrompts([f"{'x' * n}" for n in range(200)], encode)
    assert prompts.rows(np.array([3, 150, 3])).ravel().tolist() == [3, 150, 3]
    assert prompts.rows(np.array([150, 7])).ravel().tolist() == [150, 7]
    assert sorted(map(len, encode.asked)) == [3, 7, 150]
    assert prompts.rows(np.arange(200)).ravel().tolist() == list(range(200))
    assert len(encode.asked) == 200


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_is_no_prompt_s_is_refused(number: int):
    with pytest.raises(IndexError, match=f"prompt {number} is out of range"):
        EncodedPrompts(["a", "b"], Recorder()).rows(np.array([0, number]))


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_artefact_and_generator_draw_the_same_images_of_the_run_s_prompts(layout: Layout):
    run, sealed = exported_text_run(layout)
    reference, graphs = open_runtime(run.generator(), "cpu"), open_runtime(sealed["onnx-cpu-fp32"], "cpu")
    assert (reference.name, graphs.name) == ("pytorch", "onnxruntime")
    assert reference.image_shape == graphs.image_shape == (3, 16, 16)
    expected = reference.draw(LATENTS, NUMBERS)
    assert np.abs(expected[3] - reference.draw(LATENTS[3:4], np.array([4]))[0]).max() > 1e-3  # the prompt matters
    np.testing.assert_allclose(graphs.draw(LATENTS, NUMBERS), expected, atol=1e-3)
    graphs.close()
    reference.close()


def test_an_image_does_not_depend_on_its_batch():
    runtime = open_runtime(exported_text_run("sd1")[1]["onnx-cpu-fp32"], "cpu")
    whole = runtime.draw(LATENTS, NUMBERS)
    np.testing.assert_allclose(draw_all(runtime, LATENTS, NUMBERS, 3), whole, atol=1e-5)


def test_prompts_that_the_run_never_saw_can_be_asked_for():
    sealed = exported_text_run("sd1")[1]["onnx-cpu-fp32"]
    texts = ("the red man", PROMPTS.texts[3])
    drawn = open_text_runtime(sealed, texts, "cpu").draw(LATENTS[:2], np.array([0, 1]))
    known = open_runtime(sealed, "cpu").draw(LATENTS[1:2], np.array([3]))
    np.testing.assert_allclose(drawn[1], known[0], atol=1e-5)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_a_prompt_beyond_the_token_limit_is_said_and_not_cut():
    runtime = open_text_runtime(exported_text_run("sd1")[1]["onnx-cpu-fp32"], ["a bag", "a bag " * 20], "cpu")
    runtime.draw(LATENTS[:1], np.array([0]))
    with pytest.raises(PromptError, match="42 tokens"):
        runtime.draw(LATENTS[:1], np.array([1]))


def test_an_fp16_graph_on_a_cpu_says_that_its_arithmetic_is_fp32():
    sealed = exported_text_run("sd1")[1]
    assert open_runtime(sealed["onnx-cpu-fp16"], "cpu").settings["arithmetic"] == "fp32"
    assert open_runtime(sealed["onnx-cpu-int8"], "cpu").settings["arithmetic"] == "int8"


@pytest.mark.skipif(RTX.module() is None, reason=f"needs TensorRT for RTX: {RTX.mend}")
@pytest.mark.skipif(gpu_capability() is not None, reason="a GPU is here")
def test_engines_are_not_runnable_without_a_gpu():
    with pytest.raises(NotRunnableHereError, match="trt-rtx-int8: a TensorRT for RTX engine needs an NVIDIA GPU"):
        open_runtime(exported_text_run("sd1")[1]["trt-rtx-int8"])
