"""The three graphs of a text-to-image generator: what is in them and that they fit each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sfd_deploy.errors import GraphError, ModelError
from sfd_deploy.export.text_folder import passing_scheduler
from sfd_deploy.export.text_graphs import require_joints, trace_text_generator, with_finite_mask
from sfd_deploy.runtime.text import PARTS, Part
from tests.export.text_runs import exported_text_run
from tests.text_world import TEXTS, Layout, text_parts


def graphs(precision: str = "fp32", layout: Layout = "sd1") -> dict[Part, ModelProto]:
    folder = exported_text_run(layout)[1][f"onnx-cpu-{precision}"].folder
    return {part: onnx.load(folder / part / "model.onnx") for part in PARTS}


def session(part: Part, layout: Layout = "sd1") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        graphs(layout=layout)[part].SerializeToString(), providers=["CPUExecutionProvider"]
    )


def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def test_inputs_and_outputs_have_the_names_that_optimum_feeds():
    found = {part: ([signature(i) for i in graph.graph.input], [signature(o) for o in graph.graph.output])
             for part, graph in graphs().items()}  # fmt: skip
    assert found == {
        "text_encoder": (
            [("input_ids", TensorProto.INT32, ["batch", 16])],
            [("last_hidden_state", TensorProto.FLOAT, ["batch", 16, 16])],
        ),
        "unet": (
            [("sample", TensorProto.FLOAT, ["batch", 4, 8, 8]), ("timestep", TensorProto.FLOAT, []),
             ("encoder_hidden_states", TensorProto.FLOAT, ["batch", 16, 16])],
            [("out_sample", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        ),
        "vae_decoder": (
            [("latent_sample", TensorProto.FLOAT, ["batch", 4, 8, 8])],
            [("sample", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_prompt_is_encoded_as_transformers_encodes_it(layout: Layout):
    parts = text_parts(layout)
    tokens = parts.tokenizer(list(TEXTS), padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = parts.text_encoder(tokens).last_hidden_state.numpy()
    (encoded,) = session("text_encoder", layout).run(None, {"input_ids": tokens.numpy().astype(np.int32)})
    np.testing.assert_allclose(encoded, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_the_u_net_s_graph_is_the_whole_step_whatever_timestep_it_is_fed(layout: Layout):
    parts = text_parts(layout)
    generator = torch.Generator().manual_seed(0)
    z, prompts = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 16, 16, generator=generator)
    # The step by hand: t_init 625 of the scaled-linear schedule, in float64 outside the network.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0)[625].sqrt().item()
    b = (1 - a * a) ** 0.5
    with torch.inference_mode():
        output = parts.unet(z * b, torch.tensor(625), encoder_hidden_states=prompts).sample.double()
    clean = (b * z - b * output) / a if layout == "sd1" else a * b * z - b * output
    for timestep in (625, 0):
        feeds = {
            "sample": z.numpy(),
            "timestep": np.array(timestep, np.float32),
            "encoder_hidden_states": prompts.numpy(),
        }
        (drawn,) = session("unet", layout).run(None, feeds)
        np.testing.assert_allclose(drawn, clean.numpy(), atol=1e-4)


def test_nothing_of_the_noise_level_is_computed_in_the_graph():
    # In FP16 the sinusoids of 625 rad would be off by up to 0.25.
    assert not {"Log", "Sin", "Cos"} & {node.op_type for node in graphs()["unet"].graph.node}


def test_the_decoder_divides_by_the_scaling_factor_and_clamps():
    vae = text_parts().vae
    latents = 30 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = vae.decode(latents / 0.18215).sample
    assert expected.abs().max() > 1
    (images,) = session("vae_decoder").run(None, {"latent_sample": latents.numpy()})
    np.testing.assert_allclose(images, expected.clamp(-1, 1).numpy(), atol=1e-4)


def test_the_folder_s_scheduler_starts_at_the_latents_and_ends_at_what_the_network_gives():
    scheduler = passing_scheduler(DDIMScheduler(beta_schedule="scaled_linear", num_train_timesteps=626))
    scheduler.set_timesteps(1)
    latents, given = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    (timestep,) = scheduler.timesteps
    assert scheduler.init_noise_sigma == 1
    assert torch.equal(scheduler.scale_model_input(latents, timestep), latents)
    assert torch.equal(scheduler.step(given, timestep, latents).prev_sample, given)


def test_only_standard_operators_and_nothing_of_this_machine():
    for graph in graphs().values():
        onnx.checker.check_model(graph, full_check=True)
        assert [item.domain for item in graph.opset_import] == [""]
        assert b".py" not in graph.SerializeToString()


def test_the_causal_mask_fits_into_fp16_and_masks_as_the_lowest_float_does():
    weights = [numpy_helper.to_array(item) for item in graphs()["text_encoder"].graph.initializer]
    floats = [value for value in weights if value.dtype == np.float32]
    assert min(value.min(initial=0) for value in floats) == -1e4
    scores = np.array([50.0, -50.0, 20.0], np.float32)
    for mask in (-1e4, np.finfo(np.float32).min):
        exponentials = np.exp(scores + np.array([0, mask, 0], np.float32) - 50)
        assert exponentials[1] == 0


def test_zeros_alone_are_no_mask():
    zeros = numpy_helper.from_array(np.zeros(4, np.float32), "bias")
    model = helper.make_model(helper.make_graph([], "zeros", [], [], [zeros]))
    assert np.array_equal(numpy_helper.to_array(with_finite_mask(model).graph.initializer[0]), np.zeros(4))


def _narrower(values: list[onnx.ValueInfoProto]) -> None:
    values[-1].type.tensor_type.shape.dim[-1].dim_value = 7


def _of_half_precision(values: list[onnx.ValueInfoProto]) -> None:
    values[-1].type.tensor_type.elem_type = TensorProto.FLOAT16


def _renamed(values: list[onnx.ValueInfoProto]) -> None:
    values[-1].name = "prompt"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_narrower, r"unet takes encoder_hidden_states FLOAT \(batch, 16, 7\)"),
        (_of_half_precision, r"gives last_hidden_state FLOAT \(batch, 16, 16\), unet takes .* FLOAT16"),
        (_renamed, "unet takes encoder_hidden_states nothing"),
    ],
)
def test_a_joint_that_does_not_fit_is_refused(fault: Callable[[list[onnx.ValueInfoProto]], None], said: str):
    traced = graphs()
    require_joints(traced)
    fault(traced["unet"].graph.input)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=said):
        require_joints(traced)


def test_a_text_encoder_with_an_attention_mask_is_refused():
    parts = text_parts()
    parts.text_encoder.config.use_attention_mask = True
    try:
        with pytest.raises(ModelError, match="attention mask"):
            trace_text_generator(parts, 2.5, 20)
    finally:
        del parts.text_encoder.config.use_attention_mask


def test_fp16_holds_half_precision_weights_in_all_three_parts_and_fp32_at_every_joint():
    for part, graph in graphs("fp16").items():
        kinds = {item.data_type for item in graph.graph.initializer if item.name.endswith("weight")}
        assert kinds == {TensorProto.FLOAT16}, part
        ends = {value.type.tensor_type.elem_type for value in [*graph.graph.input, *graph.graph.output]}
        assert TensorProto.FLOAT16 not in ends


def test_int8_is_the_u_net_s_alone_and_leaves_the_products_inside_attention():
    whole, mixed = graphs("fp32"), graphs("int8")
    assert mixed["text_encoder"] == whole["text_encoder"]
    assert mixed["vae_decoder"] == whole["vae_decoder"]
    unet = mixed["unet"].graph
    assert len([node for node in unet.node if node.op_type == "QuantizeLinear"]) > 10
    makers = {output: node for node in unet.node for output in node.output}
    quantised = {node.name for node in unet.node if node.op_type in {"Conv", "MatMul"}
                 and makers[node.input[0]].op_type == "DequantizeLinear"}  # fmt: skip
    assert any(".attn2.to_k/" in name for name in quantised)
    assert not [name for name in quantised if ".attn1/" in name or ".attn2/" in name or "conv_in" in name]
