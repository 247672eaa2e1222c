from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sfd_deploy.training.text_teacher.config import VaeConfig
from sfd_deploy.training.text_teacher.vae import VaeTraining, build_vae, posterior, sampled, train_vae, vae_loss
from tests.training.text_toy import VALUES, toy_config, toy_wardrobe

WATCH = toy_config().monitor


def vae_config(**changes) -> VaeConfig:
    return VaeConfig.from_mapping(VALUES["vae"] | changes, "toy")


def test_the_loss_is_squared_plus_absolute_error_plus_kl():
    images, config = torch.zeros(2, 3, 4, 4).double(), vae_config(absolute_weight=0.5, kl_weight=0.1)
    standard = torch.zeros(2, 4, 2, 2).double()
    assert vae_loss(images, images, standard, standard, config) == 0
    assert vae_loss(images, images - 0.3, standard, standard, config).item() == pytest.approx(0.09 + 0.5 * 0.3)
    draws = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(2, 4, 2, 2, generator=draws).double() for _ in range(2))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(standard, standard + 1)).mean()
    assert vae_loss(images, images, mean, log_variance, config).item() == pytest.approx(0.1 * expected.item())


def test_sampled_latents_have_the_posterior_s_mean_and_spread():
    mean, log_variance = torch.full((200, 1, 20, 20), 3.0), torch.full((200, 1, 20, 20), -1.386294)
    latents = sampled(mean, log_variance, torch.Generator().manual_seed(0))
    assert latents.mean().item() == pytest.approx(3.0, abs=0.01)
    assert latents.std().item() == pytest.approx(0.5, abs=0.01)  # exp(-2 ln 2 / 2)


def test_scaled_latents_have_spread_one(tmp_path: Path):
    """On other images than were measured; stock diffusers' convention, latents times scaling_factor."""
    trained = train_vae(vae_config(), toy_wardrobe(), tmp_path / "a.safetensors", WATCH, seed=0)
    images = toy_wardrobe().draw(512, torch.Generator().manual_seed(9)).images
    with torch.no_grad():
        latents = trained.vae.encode(images).latent_dist.mean * trained.vae.config.scaling_factor
        error = (trained.vae.decode(latents / trained.vae.config.scaling_factor).sample.clamp(-1, 1) - images).square()
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)
    assert trained.squared_error == pytest.approx(error.mean().item(), rel=0.05)


def test_latents_are_halved_between_levels_and_measured_in_float32_under_autocast():
    vae, images = build_vae(vae_config()), torch.zeros(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mean, log_variance = posterior(vae, images)
    assert mean.shape == log_variance.shape == (2, 4, 8, 8)
    assert mean.dtype == log_variance.dtype == torch.float32


def test_an_autoencoder_learns_to_draw_what_it_sees():
    training = VaeTraining(vae_config(images=8 * 60, learning_rate=0.01, decay_share=0.0), toy_wardrobe(), 0, "cpu")
    losses = [training.iterate(step) for step in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_every_weight_of_the_autoencoder_is_trained():
    training = VaeTraining(vae_config(), toy_wardrobe(), 0, "cpu")
    before = {name: value.clone() for name, value in training.vae.state_dict().items()}
    training.iterate(0)
    after = training.vae.state_dict()
    assert {name for name, value in before.items() if torch.equal(value, after[name])} == set()


def test_a_preview_shows_each_row_above_what_the_average_makes_of_it():
    training = VaeTraining(vae_config(), toy_wardrobe(), 0, "cpu")
    images = torch.from_numpy(training.preview(3))
    assert images.shape == (8, 3, 3, 32, 32)
    with torch.no_grad():
        latents = training.ema.network.encode(images[2]).latent_dist.mean
        assert torch.allclose(images[3], training.ema.network.decode(latents).sample.clamp(-1, 1), atol=1e-5)
    assert torch.equal(images, torch.from_numpy(training.preview(3)))
