from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from sfd_deploy.adopt import child
from sfd_deploy.models.generator import save_generator
from sfd_deploy.models.network import NetworkConfig
from tests.adopt.official import OfficialUNet, random_network, saved_list
from tests.conftest import tiny_generator

NAMES = "circle,square,star"


def tiny_unet(rows: int = 3, channels: int = 1, seed: int = 3) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = NetworkConfig(image_size=16, channels=channels, block_channels=(8, 16), norm_groups=4).build(rows)
    return unet.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def save_folder(folder: Path, unet: UNet2DModel, scheduler: object) -> Path:
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """A ConsistencyModelPipeline folder of a generator, without a manifest."""
    save_generator(tiny_generator(), tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.fixture(scope="session")
def official_network() -> OfficialUNet:
    return random_network()


@pytest.fixture(scope="session")
def official_file(official_network: OfficialUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the official distillation saves it, its EMA unlike the rest."""
    file = tmp_path_factory.mktemp("official") / "ckpt-49999.pth"
    torch.save(saved_list(official_network), file)
    return file


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads checkpoints in this process: starting PyTorch in another takes seconds, and a few tests do."""
    monkeypatch.setattr(
        "sfd_deploy.adopt.checkpoint._run_child", lambda file, target, seconds: child.extract(file, target)
    )
