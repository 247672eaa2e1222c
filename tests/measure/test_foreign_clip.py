"""Zero-shot CLIP against stock transformers, on a tiny CLIP with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd_deploy.errors import ConfigError, ModelError, PromptError
from sfd_deploy.measure.foreign.adopt import foreign_config
from sfd_deploy.measure.judges import open_judge
from sfd_deploy.runtime.seam import to_uint8
from sfd_deploy.training.data import LabelledImages
from tests.measure.foreign_world import adopt, adopted
from tests.text_world import TOKENS, clip_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'sfd-deploy[t2i]'")
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

PROMPTS = {"sandal": ["a photo of a sandal", "a red sandal"], "bag": "a bag", "coat": "the coat on a black background"}
VALUES = {"kind": "clip", "classes": PROMPTS}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(6)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = common | {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS,
                     "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}  # fmt: skip
    vision = common | {"image_size": 16, "patch_size": 8}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.6)  # at CLIP's own small start every image looks the same
    network.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    draws = np.random.default_rng(0)
    colours = draws.integers(0, 256, (24, 3, 1, 1))  # noise alone looks the same to a random network
    pixels = (colours + draws.integers(-30, 30, (24, 3, 20, 28))).clip(0, 255).astype(np.uint8)
    return LabelledImages(pixels, np.arange(24) % 3, ("bag", "coat", "sandal"))


def stock(folder: Path, pictures: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, T) and normalised image embeddings of stock transformers, for uint8 (N, H, W, 3)."""
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(folder), tokenizer=CLIPTokenizer.from_pretrained(folder)
    )
    inputs = processor(text=texts, images=list(pictures), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).eval()(**inputs)
    return found.logits_per_image.numpy(), found.image_embeds.numpy()


def test_one_prompt_a_class_gives_stock_transformers_labels(clip, data, tmp_path):
    texts = ["a red sandal", "a bag", "the coat on a black background"]
    values = {"kind": "clip", "classes": dict(zip(("sandal", "bag", "coat"), texts, strict=True))}
    judge = adopted(values, clip, data, tmp_path / "judge")
    images = data.batch(torch.arange(24))[0].numpy()
    logits, embedded = stock(clip, data.images.transpose(0, 2, 3, 1), texts)
    called, features = judge.look(images)
    assert np.array_equal(called, logits.argmax(1))
    assert len(set(called.tolist())) > 1  # or nothing was compared
    assert features == pytest.approx(embedded, abs=1e-5)
    assert judge.class_names == ("sandal", "bag", "coat")
    truth = np.array([1, 2, 0])[data.labels]  # the judge's order: bag 1, coat 2, sandal 0
    assert np.array_equal(judge.held_out, np.stack([truth, called]))


def test_several_prompts_are_the_mean_of_their_normalised_embeddings(clip, data, tmp_path):
    judge = adopted(VALUES, clip, data, tmp_path / "judge")
    texts = ["a photo of a sandal", "a red sandal", "a bag", "the coat on a black background"]
    with torch.no_grad():
        tokens = CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
        found = CLIPModel.from_pretrained(clip).eval().get_text_features(**tokens).numpy()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    classes = np.stack([(found[0] + found[1]) / 2, found[2], found[3]])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    called, features = judge.look(data.batch(torch.arange(24))[0].numpy())
    assert np.array_equal(called, (features @ classes.T).argmax(1))
    # An unnormalised mean would be another judge; a class of one prompt alone as well.
    first = stock(clip, data.images.transpose(0, 2, 3, 1), [texts[0], *texts[2:]])[0].argmax(1)
    assert not np.array_equal(called, first)


def test_grey_images_are_shown_as_coloured_ones(clip, data, tmp_path):
    judge = adopted(VALUES, clip, data, tmp_path / "judge")
    grey = data.batch(torch.arange(24))[0][:, :1].numpy()
    assert np.array_equal(judge.look(grey)[0], judge.look(np.repeat(grey, 3, 1))[0])


def test_a_sealed_clip_opens_to_what_was_measured_and_holds_no_pickle(clip, data, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(clip, source)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    sealed = adopt(VALUES, source, data, tmp_path / "judge")
    assert "model/pytorch_model.bin" not in sealed.manifest.files
    judge = open_judge(tmp_path / "judge")
    called, _ = judge.look(data.batch(torch.arange(24))[0].numpy(), batch=5)
    assert np.array_equal(called, judge.held_out[1])


def test_weights_in_shards_are_adopted(clip, data, tmp_path):
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        shutil.copy(clip / name, tmp_path / "parts" / name)
    sealed = adopt(VALUES, tmp_path / "parts", data, tmp_path / "judge")
    assert sum(name.endswith(".safetensors") and "model-0" in name for name in sealed.manifest.files) > 1
    whole = adopted(VALUES, clip, data, tmp_path / "whole")
    assert np.array_equal(open_judge(tmp_path / "judge").held_out, whole.held_out)


def changed(clip: Path, target: Path, *, drop: str = "", model_type: str = "clip", lose: str = "") -> Path:
    shutil.copytree(clip, target)
    if drop:
        (target / drop).unlink()
    config = json.loads((clip / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    if lose:
        weights = load_file(clip / "model.safetensors")
        save_file({name: value for name, value in weights.items() if name != lose}, target / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "model.safetensors"}, "no weights in model.safetensors, and pickled ones are not read"),
        ({"drop": "merges.txt"}, "merges.txt is missing"),
        ({"drop": "preprocessor_config.json"}, "preprocessor_config.json is missing"),
        ({"model_type": "siglip"}, "config.json says model_type siglip"),
        ({"lose": "visual_projection.weight"}, "its weights lack visual_projection.weight"),
    ],
)
def test_a_folder_that_is_not_a_whole_clip_is_one_line(clip, data, tmp_path, change, message):
    source = changed(clip, tmp_path / "source", **change)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError) as caught:
        adopt(VALUES, source, data, tmp_path / "judge")
    assert message in caught.value.what
    assert caught.value.what.startswith(str(source))
    assert not (tmp_path / "judge").exists()


DAMAGED = (
    ("model.safetensors", b"no"),
    ("preprocessor_config.json", b"{"),
    ("config.json", b"[1]"),
    ("vocab.json", b"{"),
)


def test_damaged_files_are_one_line(clip, data, tmp_path):
    for name, content in DAMAGED:
        source = tmp_path / name
        shutil.copytree(clip, source)
        (source / name).write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot be loaded|not a readable CLIP folder") as caught:
            adopt(VALUES, source, data, tmp_path / "judge")
        assert ".writing" not in str(caught.value)


def test_a_prompt_beyond_the_text_encoder_is_refused_not_cut(clip, data, tmp_path):
    long = {"kind": "clip", "classes": PROMPTS | {"bag": "a bag " * TOKENS}}
    with pytest.raises(PromptError, match="the text encoder reads 16"):
        adopt(long, clip, data, tmp_path / "judge")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": "x"}, "at least 2"),
        ({"a": "x", "b": []}, "class b has an empty prompt"),
        ({"a": "x", "b": " "}, "class b"),
    ],
)
def test_classes_without_prompts_are_refused(classes, message):
    with pytest.raises(ConfigError, match=message):
        foreign_config({"kind": "clip", "classes": classes}, "mine.yaml")


def test_pictures_are_shown_in_whole_levels():
    assert to_uint8(np.array([-1, 0.001, 1], np.float32)).tolist() == [0, 128, 255]


def test_a_kind_that_is_no_word_is_one_line():
    with pytest.raises(ConfigError, match="`kind` is"):
        foreign_config({"kind": ["onnx"]}, "mine.yaml")
