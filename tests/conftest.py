"""Shared fixtures. The tiny run has random weights: it tests mechanics, never quality."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sfd_deploy.labels import Labels
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator, save_generator
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.runs import Run, sealed_folder

pytest_plugins = ["tests.serving.fixtures"]

# A shared machine makes single examples slow at random; time is never what a test asserts.
settings.register_profile("untimed", deadline=None, max_examples=50)
settings.load_profile("untimed")

TINY_LABELS = Labels(class_names=("circle", "square", "star"), forget={1: 2})


def tiny_generator(seed: int = 0) -> OneStepGenerator:
    """A 16x16 one-channel generator of about 60 thousand random weights and three labels."""
    torch.manual_seed(seed)
    unet = NetworkConfig(image_size=16, channels=1, block_channels=(8, 16), norm_groups=4).build(3)
    return OneStepGenerator(EdmDenoiser(unet.eval().requires_grad_(False), 0.5), 2.5).eval()


def seal_tiny_run(folder: Path, seed: int = 0) -> Run:
    """A run folder whose generator is ``tiny_generator``."""
    generator = tiny_generator(seed)
    facts = {
        "labels": TINY_LABELS.resolved(), "sigma_init": 2.5, "sigma_data": 0.5, "image_shape": [1, 16, 16],
    }  # fmt: skip
    with sealed_folder(folder / "generator", "generator", facts=facts) as target:
        save_generator(generator, target)
    return Run(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: one worker trains the demo's generator while the other does the rest."""
    items.sort(key=lambda item: item.path.name != "test_fashion.py")


@pytest.fixture(autouse=True)
def torch_threads_are_left_as_they_were() -> Iterator[None]:
    """A command called with ``--threads 1`` would slow every test after it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Shared and read-only: tests that change a run make their own with ``seal_tiny_run``."""
    return seal_tiny_run(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def fashion_data() -> Path:
    """The Fashion-MNIST IDX files, from SFD_DEPLOY_DATA or beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SFD_DEPLOY_DATA", beside)) / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"needs Fashion-MNIST's IDX files in {folder} (set SFD_DEPLOY_DATA)")
    return folder
