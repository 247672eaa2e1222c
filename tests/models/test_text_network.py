from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from sfd_deploy.errors import BAD_INPUT, ModelError, PromptError
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.models.generator import image_shape
from sfd_deploy.models.text.folder import open_text_teacher
from sfd_deploy.models.text.network import (
    PromptedUNet,
    encode,
    load_text_denoiser,
    require_prediction_fits,
    text_denoiser,
)
from tests.text_world import SD_BETAS, TEXTS, TOKENS, text_parts, text_pipeline

LONGEST = "a " * (TOKENS - 2)


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_prompts_are_encoded_as_stock_diffusers_encodes_them(layout, tmp_path):
    folder = text_pipeline(tmp_path, layout)
    stock = StableDiffusionPipeline.from_pretrained(folder, requires_safety_checker=False)
    expected, negative = stock.encode_prompt(list(TEXTS), "cpu", 1, True, list(reversed(TEXTS)))
    ours = encode(text_parts(layout), TEXTS)
    assert ours.shape == (len(TEXTS), TOKENS, 16)
    assert torch.equal(ours, expected)
    assert torch.equal(ours.flip(0), negative)


def test_a_prompts_encoding_does_not_depend_on_its_neighbours_nor_on_how_often_it_is_asked():
    parts = text_parts()
    many = [TEXTS[number % 5] for number in range(70)] + [f"a bag {number}" for number in range(70)]
    encoded = encode(parts, many)
    assert encoded.shape[0] == 140
    assert torch.equal(encoded[0], encoded[65])
    assert encoded[139] == pytest.approx(encode(parts, ["a bag 69"])[0], abs=1e-6)


def test_a_prompt_at_the_token_limit_is_encoded_and_one_beyond_is_named_not_cut():
    parts = text_parts()
    assert encode(parts, [LONGEST]).shape == (1, TOKENS, 16)
    with pytest.raises(PromptError, match=r"prompt 'a a .* coat' has 17 tokens.*reads 16") as caught:
        encode(parts, ["a bag", f"{LONGEST}coat"])
    assert caught.value.exit_code == BAD_INPUT
    assert "\n" not in str(caught.value)


def test_a_denoisers_condition_is_the_prompt_of_that_number():
    parts = text_parts()
    denoiser = load_text_denoiser(parts, TEXTS)
    noisy, sigma, asked = torch.randn(3, 4, 8, 8), torch.tensor([0.5, 2.5, 9.0]), torch.tensor([3, 0, 1])
    a = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
    prompts = encode(parts, [TEXTS[number] for number in asked])
    noise = parts.unet(noisy * a, denoiser.timestep(sigma), encoder_hidden_states=prompts).sample
    expected = noisy - sigma.reshape(-1, 1, 1, 1) * noise
    assert denoiser(noisy, sigma, asked) == pytest.approx(expected, abs=1e-5)
    assert image_shape(denoiser.unet) == (4, 8, 8)
    other = denoiser(noisy, sigma, torch.tensor([3, 0, 2]))
    assert torch.equal(other[:2], denoiser(noisy, sigma, asked)[:2])
    assert not torch.equal(other[2], denoiser(noisy, sigma, asked)[2])


@pytest.mark.parametrize("number", [-1, len(TEXTS)])
def test_a_number_that_is_no_prompts_is_an_error(number):
    denoiser = text_denoiser(text_parts(), TEXTS)
    with pytest.raises(IndexError):
        denoiser(torch.randn(1, 4, 8, 8), torch.ones(1), torch.tensor([number]))


def test_copies_share_the_table_of_prompts_and_no_weight():
    denoiser = text_denoiser(text_parts(), TEXTS)
    copied = copy.deepcopy(denoiser)
    assert copied.unet.table.data_ptr() == denoiser.unet.table.data_ptr()
    ours, theirs = (dict(network.named_parameters()) for network in (denoiser, copied))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert not {weight.data_ptr() for weight in ours.values()} & {weight.data_ptr() for weight in theirs.values()}
    nn.init.zeros_(copied.unet.unet.conv_out.weight)
    assert denoiser.unet.unet.conv_out.weight.any()


def test_the_table_is_no_weight_and_is_not_saved_but_moves_with_the_network():
    denoiser = text_denoiser(text_parts(), TEXTS)
    assert [name for name in denoiser.state_dict() if "table" in name] == []
    assert [name for name, _ in denoiser.named_parameters() if "table" in name] == []
    assert copy.deepcopy(denoiser).to(torch.float64).unet.table.dtype == torch.float64


def test_gradients_reach_the_networks_weights_and_its_input():
    denoiser = copy.deepcopy(text_denoiser(text_parts(), TEXTS)).requires_grad_(True)
    denoiser.unet.unet.enable_gradient_checkpointing()
    noisy = torch.randn(2, 4, 8, 8, requires_grad=True)
    denoiser.train()(noisy, torch.ones(2), torch.tensor([1, 2])).square().sum().backward()
    assert noisy.grad is not None
    assert all(weight.grad is not None for weight in denoiser.parameters())


class Gaussian(nn.Module):
    """What a perfect network answers where latents are N(mu, tau^2), in the textbook's a and b."""

    def __init__(self, predicts: str, scheduler: DDIMScheduler, mu: float, tau: float) -> None:
        super().__init__()
        self.config = {"sample_size": 8, "in_channels": 4}
        self.predicts, self.alpha_bar, self.mu, self.tau = predicts, scheduler.alphas_cumprod.double(), mu, tau

    def forward(self, x_t: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        alpha_bar = self.alpha_bar[timestep.long()].reshape(-1, 1, 1, 1)
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean = self.mu + a * self.tau**2 / (a**2 * self.tau**2 + b**2) * (x_t - a * self.mu)
        noise = (x_t - a * clean) / b
        return SimpleNamespace(sample={"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean}[
            self.predicts
        ].to(x_t.dtype))  # fmt: skip


PREDICTS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize(("mu", "tau"), [(0.0, 1.0), (0.5, 0.3), (-1.0, 2.0), (0.0, 0.05)])
@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("said", PREDICTS)
def test_a_network_that_predicts_another_thing_than_its_scheduler_says_is_refused(
    said, predicts, mu, tau, zero_terminal
):
    scheduler = DDIMScheduler(**SD_BETAS, prediction_type=said, rescale_betas_zero_snr=zero_terminal)
    denoiser = DiscreteDenoiser(Gaussian(predicts, scheduler, mu, tau), scheduler)
    if (said == "epsilon") == (predicts == "epsilon"):
        require_prediction_fits(denoiser, Path("here"))
    else:
        with pytest.raises(ModelError, match=f"here: the scheduler says {said}, but given pure noise") as caught:
            require_prediction_fits(denoiser, Path("here"))
        assert caught.value.exit_code == BAD_INPUT


@pytest.mark.parametrize(("layout", "said"), [("sd1", "v_prediction"), ("sd2", "epsilon")])
def test_a_folder_whose_scheduler_contradicts_its_network_is_one_line(layout, said, tmp_path):
    folder = text_pipeline(tmp_path / "pipeline", layout)
    DDIMScheduler(**SD_BETAS, prediction_type=said).save_pretrained(folder / "scheduler")
    with pytest.raises(ModelError, match=f"pipeline: the scheduler says {said}") as caught:
        load_text_denoiser(open_text_teacher(folder), TEXTS)
    assert "\n" not in str(caught.value)


def test_the_table_is_asked_in_the_order_of_its_texts():
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
            seen.append(encoder_hidden_states)
            return SimpleNamespace(sample=sample)

    table = torch.arange(24.0).reshape(4, 3, 2)
    PromptedUNet(Spy(), table)(torch.zeros(2, 4, 8, 8), torch.ones(2), torch.tensor([2, 0]))
    assert torch.equal(seen[0], table[[2, 0]])


def test_encoding_says_how_many_prompts_and_where(caplog):
    with caplog.at_level("INFO", "sfd_deploy"):
        encode(text_parts(), ["a bag", "a coat", "a bag"])
    assert "encoding 2 prompts on cpu" in caplog.text
