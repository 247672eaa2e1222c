from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfd_deploy.errors import ConfigError, ManifestError
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import verify
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator, labels_of, load_generator, load_teacher, save_teacher
from sfd_deploy.models.network import Ema, NetworkConfig
from sfd_deploy.models.sampler import SamplerConfig, heun
from sfd_deploy.runs import Run, sealed_folder
from tests.conftest import TINY_LABELS, tiny_generator


class GaussianNet(nn.Module):
    """The network whose EDM-preconditioned denoiser is exactly that of N(mu, tau^2), per pixel."""

    def __init__(self, mu: float, tau: float, sigma_data: float) -> None:
        super().__init__()
        self.mu, self.tau, self.sigma_data = mu, tau, sigma_data

    def forward(self, scaled: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        sigma = (timestep / 250).exp().reshape(-1, 1, 1, 1)
        norm = sigma**2 + self.sigma_data**2
        noisy = scaled * norm.sqrt()
        clean = self.mu + self.tau**2 / (self.tau**2 + sigma**2) * (noisy - self.mu)
        output = (clean - self.sigma_data**2 / norm * noisy) * norm.sqrt() / (sigma * self.sigma_data)
        return type("Output", (), {"sample": output})


@pytest.mark.parametrize(
    ("mu", "tau", "mean", "std"), [(3.0, 0.5, 2.884822, 0.096071), (-1.0, 1.0, -0.862290, 0.344595)]
)
def test_one_step_of_an_exact_teacher_has_the_closed_form_moments(mu, tau, mean, std):
    # The pinned moments are at DDPM's t = 440.
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[440].item()
    generator = OneStepGenerator(EdmDenoiser(GaussianNet(mu, tau, 0.5), 0.5), math.sqrt(1 / alpha_bar - 1))
    z = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    high, low = generator.unclamped(z, torch.zeros(2, dtype=torch.int64)).flatten().tolist()
    assert ((high + low) / 2, (high - low) / 2) == pytest.approx((mean, std), abs=1e-5)


def test_the_sampler_counts_its_network_evaluations():
    calls: list[int] = []

    def denoise(noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return torch.zeros_like(noisy)

    config = SamplerConfig(steps=18)
    heun(denoise, torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), config)
    assert len(calls) == config.network_evaluations == 35


def test_stock_diffusers_loads_the_folder_and_draws_the_same_images(tiny_run: Run):
    from diffusers import DiffusionPipeline
    from diffusers.utils.torch_utils import randn_tensor

    pipeline = DiffusionPipeline.from_pretrained(tiny_run.generator().folder)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 1, 2, 1])
    draw = lambda: torch.Generator().manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own deprecations
        stock = pipeline(
            batch_size=4, num_inference_steps=1, class_labels=labels, generator=draw(), output_type="np"
        ).images
    # With one channel the pipeline takes no latents, so its own draw is repeated.
    latents = randn_tensor((4, 1, 16, 16), generator=draw(), dtype=torch.float32)
    ours = load_generator(tiny_run.generator())(latents, labels)
    assert torch.from_numpy(stock).permute(0, 3, 1, 2) == pytest.approx(((ours + 1) / 2).numpy(), abs=1e-4)


def test_saving_and_loading_keeps_every_weight(tiny_run: Run):
    loaded = load_generator(tiny_run.generator()).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tiny_generator().state_dict().items())


def test_a_teacher_folder_keeps_every_weight(tmp_path: Path):
    denoiser = tiny_generator().denoiser
    facts = {"labels": TINY_LABELS.plain().resolved(), "sigma_data": 0.5}
    with sealed_folder(tmp_path / "teacher", "teacher", facts=facts) as folder:
        save_teacher(denoiser, folder)
    sealed = verify(tmp_path / "teacher", "teacher")
    loaded = load_teacher(sealed).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in denoiser.state_dict().items())
    assert labels_of(sealed) == Labels(class_names=TINY_LABELS.class_names)


def test_a_folder_without_labels_is_refused(tmp_path: Path):
    with sealed_folder(tmp_path / "teacher", "teacher"):
        pass
    with pytest.raises(ManifestError, match="no labels"):
        labels_of(verify(tmp_path / "teacher"))


def test_ema_is_ramped_so_that_the_start_is_forgotten():
    source = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(source.weight)
    ema = Ema(source, decay=0.999)
    nn.init.ones_(source.weight)
    expected = 0.0
    for step in range(20):
        ema.update(source, step)
        kept = min(0.999, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept)
    assert ema.network.weight.item() == pytest.approx(expected)
    assert expected > 0.99  # a fixed 0.999 would still be at 0.02


def test_network_config_builds_what_it_says():
    config = NetworkConfig(
        image_size=16, channels=3, block_channels=(8, 16), attention_levels=(1,), head_channels=8, norm_groups=4
    )
    unet = config.build(5)
    assert unet.config["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D")
    assert unet.config["up_block_types"] == ("AttnUpBlock2D", "UpBlock2D")
    images = unet(torch.zeros(2, 3, 16, 16), torch.zeros(2), class_labels=torch.tensor([0, 4])).sample
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "image_size 18 cannot be halved 2 times: use fewer levels"),
        ({"norm_groups": 3}, "norm_groups 3 do not divide 8 channels"),
        ({"block_channels": (8, 0, 8)}, "channels must be positive"),
        ({"attention_levels": (3,)}, "attention level 3, but the network has 3 levels"),
        ({"attention_levels": (-1,)}, "attention level -1, but the network has 3 levels"),
        ({"attention_levels": (0,), "head_channels": 3}, "head_channels 3 do not divide 8 channels"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_by_its_config(changes, message):
    values = {"image_size": 16, "channels": 1, "block_channels": (8, 8, 8), "norm_groups": 4} | changes
    with pytest.raises(ConfigError, match=message):
        NetworkConfig.from_mapping(values, "test")
