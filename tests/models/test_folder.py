from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from sfd_deploy.errors import BAD_INPUT, ModelError
from sfd_deploy.models.denoiser import DiscreteDenoiser, EdmDenoiser, FlowDenoiser
from sfd_deploy.models.folder import find_layout
from sfd_deploy.models.generator import require_finite
from sfd_deploy.models.parameterisation import read_denoiser
from tests.models.exact import KINDS
from tests.models.tiny import foreign_folder, tiny_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An epsilon model as somebody else saved it."""
    return foreign_folder(tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "unet" / WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_folder_gives_the_denoiser_that_was_saved(kind, tmp_path):
    saved, found = tiny_denoiser(kind), read_denoiser(foreign_folder(tmp_path, kind))
    noisy, sigma, labels = torch.randn(3, 1, 16, 16), torch.tensor([0.2, 2.5, 13.0]), torch.tensor([0, 1, 2])
    assert type(found) is type(saved)
    assert torch.equal(found.eval()(noisy, sigma, labels), saved(noisy, sigma, labels))


def test_a_bare_network_with_its_scheduler_config_beside_it_is_the_same_model(folder, tmp_path):
    bare = tmp_path / "bare"
    (folder / "unet").rename(bare)
    (folder / "scheduler" / "scheduler_config.json").rename(bare / "scheduler_config.json")
    assert isinstance(read_denoiser(bare), DiscreteDenoiser)


def test_half_precision_weights_are_widened(folder):
    UNet2DModel.from_pretrained(folder / "unet").half().save_pretrained(folder / "unet")
    assert {weight.dtype for weight in read_denoiser(folder).unet.parameters()} == {torch.float32}


def test_the_schedulers_numbers_are_the_denoisers(tmp_path):
    edm = foreign_folder(tmp_path / "edm", "edm-euler")
    edit(edm / "scheduler" / "scheduler_config.json", sigma_data=1.5)
    flow = foreign_folder(tmp_path / "flow", "flow")
    edit(flow / "scheduler" / "scheduler_config.json", num_train_timesteps=500)
    found = read_denoiser(edm), read_denoiser(flow)
    assert isinstance(found[0], EdmDenoiser)
    assert (found[0].sigma_data, found[0].timestep_scale) == (1.5, 0.25)
    assert isinstance(found[1], FlowDenoiser)
    assert found[1].timestep(torch.tensor([1.0])).item() == 250


def refused(folder: Path) -> str:
    """The one line that refuses a folder."""
    with pytest.raises(ModelError) as caught:
        read_denoiser(folder)
    assert caught.value.exit_code == BAD_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": None}, "prediction type missing"),
        ({"prediction_type": "score"}, "prediction type 'score' is unknown"),
        ({"_class_name": "KarrasVeScheduler"}, "scheduler KarrasVeScheduler is unknown"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "does not preserve variance"),
        ({"beta_schedule": "wiggly"}, "not a schedule that diffusers makes"),
        ({"num_train_timesteps": "many"}, "not a schedule that diffusers makes"),
        ({"num_train_timesteps": 1}, "scheduler_config.json: the schedule's noise levels do not rise"),
        ({"num_train_timesteps": 0}, "the schedule's noise levels do not rise"),
        ({"beta_end": -0.02}, "the schedule's noise levels do not rise"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": "x"}, "sigma_data is 'x'"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_data": 0}, "sigma_data is 0"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": -1}, "sigma_min is -1"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas: its times run"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": [1]}, "num_train_timesteps is [1]"),
    ],
)
def test_a_scheduler_that_says_no_parameterisation_is_refused(folder, changes, message):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel, not a UNet2DModel"),
        ({"num_class_embeds": None}, "takes no class labels"),
        ({"class_embed_type": "timestep"}, "takes no class labels"),
        ({"out_channels": 2}, "1 channels in, 2 out: a learned variance"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is fourier"),
        ({"sample_size": None}, "no sample_size"),
        ({"sample_size": "8"}, "sample_size is '8'"),
        ({"sample_size": -8}, "sample_size is -8"),
        ({"sample_size": [8, 8, 8]}, "sample_size is [8, 8, 8]"),
        ({"num_class_embeds": "x"}, "num_class_embeds is 'x'"),
        ({"num_class_embeds": True}, "num_class_embeds is True"),
        ({"in_channels": 5, "out_channels": 5}, "5 channels, where an image has at most 4"),
        ({"num_class_embeds": 4}, "weights"),
        ({"layers_per_block": 2}, "weights"),
        ({"down_block_types": ["DownBlock2D"]}, "weights"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused(folder, changes, message):
    edit(folder / "unet" / "config.json", **changes)
    assert message in refused(folder)


def test_a_folder_without_scheduler_says_that_the_prediction_type_is_missing(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "prediction type missing" in refused(folder)


def test_a_folder_of_another_layout_is_refused(tmp_path):
    assert "neither unet/config.json nor config.json" in refused(tmp_path)


def test_pickled_weights_are_refused_unread(folder):
    weights = folder / "unet" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "only diffusion_pytorch_model.bin, a pickle" in refused(folder)


def test_a_folder_with_only_a_variant_of_the_weights_is_refused_by_its_name(folder):
    weights = folder / "unet" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "only a variant of the weights, diffusion_pytorch_model.fp16.safetensors; save it" in refused(folder)


def test_a_damaged_config_or_weight_file_is_one_line(folder):
    (folder / "unet" / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{}      rest")
    assert "weights cannot be loaded" in refused(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    assert "scheduler_config.json: not readable JSON" in refused(folder)


def test_a_missing_weight_is_refused_and_not_left_at_random(folder):
    edit_weights(folder, lambda tensors: tensors.pop("conv_out.bias"))
    assert "missing keys: conv_out.bias" in refused(folder)


def test_a_weight_that_the_network_does_not_know_is_refused(folder):
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "unexpected keys: extra" in refused(folder)


def test_weights_and_images_that_are_not_finite_are_refused(folder):
    denoiser = tiny_denoiser("epsilon")
    require_finite(denoiser, folder)
    denoiser.unet.conv_out.bias.fill_(3e38)
    denoiser.unet.conv_out.weight.fill_(3e38)
    with pytest.raises(ModelError, match="non-finite network: its prediction at sigma 1"):
        require_finite(denoiser, folder)
    denoiser.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ModelError, match=r"non-finite network: conv_out\.bias"):
        require_finite(denoiser, folder)


def test_a_network_that_cannot_draw_its_own_size_is_one_line_and_no_bug_of_ours(folder):
    edit(folder / "unet" / "config.json", sample_size=15)  # halved to 8, doubled to 16
    with pytest.raises(ModelError, match=r"draws no image of 1 x 15 x 15 \(") as caught:
        require_finite(read_denoiser(folder), folder)
    assert "\n" not in str(caught.value)


def test_only_what_is_read_belongs_to_the_layout(folder):
    (folder / "README.md").write_text("words")
    (folder / "unet" / "optimizer.bin").write_bytes(b"")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "config.json").write_text("{}")
    names = [path.relative_to(folder).as_posix() for path in find_layout(folder).files(folder)]
    assert names == ["scheduler/scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}"]
