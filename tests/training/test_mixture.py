"""The mixture override against a closed form: Gaussian classes, where every denoiser and posterior is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfd_deploy.labels import MIXTURE, Labels
from sfd_deploy.training.losses import score_gap_loss
from sfd_deploy.training.mixture import retained_probabilities, teacher_prediction
from sfd_deploy.training.rows import MIXED
from tests.conftest import TINY_LABELS
from tests.training.test_loop import tiny_loop
from tests.training.test_losses import ddpm_levels, denoise, descend

# Classes N(mu, tau^2), all in [-1, 1]: forgotten 0, retained 1 and 2.
MU, TAU = torch.tensor([0.8, -0.4, 0.3], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64)
RETAINED = (1, 2)


def exact(noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """E[x | y, class] for y = x + sigma * noise, (B, 1, 1, 1)."""
    mu, variance = (values[labels].reshape(-1, 1, 1, 1) for values in (MU, TAU**2))
    return mu + variance / (variance + sigma.reshape(-1, 1, 1, 1) ** 2) * (noisy - mu)


def mixture_by_quadrature(noisy: float, sigma: float) -> float:
    """E[x | y] of the equal mixture of the retained classes, by brute force over a grid of x."""
    x = torch.linspace(-4, 4, 200_001, dtype=torch.float64)
    prior = sum((-((x - MU[c]) ** 2) / (2 * TAU[c] ** 2)).exp() / TAU[c] for c in RETAINED)
    posterior = prior * (-((noisy - x) ** 2) / (2 * sigma**2)).exp()
    return ((posterior * x).sum() / posterior.sum()).item()


def test_with_a_perfect_classifier_the_target_is_the_mixtures_exact_denoiser():
    noisy = torch.tensor([-0.6, -0.1, 0.05, 0.4], dtype=torch.float64).reshape(-1, 1, 1, 1)
    sigma = torch.full((4,), 0.3, dtype=torch.float64)
    psi_mean, psi_std = 0.1, 0.4  # the generator's own law; its denoiser is what the classifier is shown
    gain = psi_std**2 / (psi_std**2 + 0.3**2)
    x_psi = psi_mean + gain * (noisy - psi_mean)
    assert x_psi.abs().max() < 1

    def classify(shown: Tensor) -> Tensor:
        """ln p(y | class), with y read back from the denoised image it is shown."""
        y = (shown.flatten() - psi_mean) / gain + psi_mean
        variance = TAU**2 + 0.3**2
        return -((y[:, None] - MU) ** 2) / (2 * variance) - variance.log() / 2

    mixing = (retained_probabilities(classify(x_psi), RETAINED), RETAINED)
    found = teacher_prediction(exact, noisy, sigma, torch.full((4,), MIXED), mixing)
    expected = [mixture_by_quadrature(y, 0.3) for y in noisy.flatten().tolist()]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-9)


def test_forget_labels_are_masked_out_and_the_rest_renormalised():
    logits = torch.tensor([[50.0, 1.0, 2.0]])
    one, two = math.exp(1), math.exp(2)
    assert retained_probabilities(logits, RETAINED).tolist()[0] == pytest.approx([one / (one + two), two / (one + two)])


def test_only_mixed_rows_are_asked_more_than_once_and_rows_keep_their_place():
    asked: list[list[int]] = []

    def predict(noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        asked.append(labels.tolist())
        return noisy * 0 + labels.reshape(-1, 1, 1, 1)

    noisy, targets = torch.zeros(4, 1, 1, 1), torch.tensor([2, MIXED, 1, MIXED])
    mixing = (torch.tensor([[0.25, 0.75], [1.0, 0.0]]), RETAINED)
    found = teacher_prediction(predict, noisy, torch.ones(4), targets, mixing)
    assert found.flatten().tolist() == [2.0, 1.75, 1.0, 1.0]
    assert asked == [[2, 1, 1, 2, 1, 2]]  # one call; two extra rows, forget rows alone


def test_the_loop_asks_the_teacher_for_retained_labels_alone_and_the_classifier_gets_no_gradient():
    labels = Labels(class_names=TINY_LABELS.class_names, forget={1: MIXTURE})
    loop, seen = tiny_loop(labels=labels), []
    head = torch.nn.Linear(256, 3)

    def classify(images: Tensor) -> Tensor:
        seen.append((images.requires_grad, len(images)))
        return head(images.flatten(1))

    loop.classify = classify
    asked: list[int] = []
    loop.teacher.register_forward_hook(lambda _m, inputs, _o: asked.extend(inputs[2].tolist()))
    loop.generator_step(0)
    assert set(asked) == {0, 2}
    assert len(asked) == 6 + 2 * 2
    assert seen == [(False, 2)]
    assert head.weight.grad is None
    assert all(p.grad is None for p in loop.fake_score.parameters())


def test_the_classifier_is_shown_the_fake_scores_clean_image_clamped_to_the_range_of_images():
    loop, seen = tiny_loop(labels=Labels(class_names=TINY_LABELS.class_names, forget={1: MIXTURE})), []
    with torch.no_grad():
        loop.fake_score.unet.conv_out.bias.add_(5.0)

    def classify(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 3)

    loop.classify = classify
    (done,) = loop.generator_step(0)
    forgotten = done.x_psi[done.rows.forgotten]
    assert forgotten.abs().max() > 1
    (shown,) = seen
    assert torch.equal(shown, forgotten.clamp(-1, 1))


def random_override(alpha: float, spreads: tuple[float, float], start: tuple[float, float]) -> tuple[float, float]:
    """Where a generator ends whose target is the plain average of two classes' denoisers, N(-2, .) and N(2, .)."""
    levels = ddpm_levels(step=23)
    z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def loss(m: Tensor, s: Tensor) -> Tensor:
        x = (m + s * z).expand(len(levels.a), 4)
        x_t = levels.a * x + levels.b * noise
        rows = []
        for mean, std in zip((-2.0, 2.0), spreads, strict=True):
            parts = (x, denoise(levels, x_t, mean, std), denoise(levels, x_t, m.detach(), s.detach()))
            rows.append(score_gap_loss(*(part.reshape(-1, 1) for part in parts), alpha).mean())
        return sum(rows) / 2  # type: ignore[return-value]

    return descend(alpha, loss, *start, 2000)


def test_control_a_random_override_lands_between_the_classes_and_is_no_mixture():
    """Two classes N(+-2, 0.25): the geometric mean N(0, 0.25) lies where neither has any mass."""
    assert random_override(1.0, (0.5, 0.5), (1.0, 1.0)) == pytest.approx((0.0, 0.5), abs=2e-3)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, (-0.285, 0.715)), (1.0, (-0.142, 0.741)), (1.2, (-0.082, 0.752))]
)
def test_control_with_unequal_spreads_where_it_lands_depends_on_alpha(alpha: float, expected: tuple[float, float]):
    assert random_override(alpha, (0.5, 1.0), (0.5, 1.0)) == pytest.approx(expected, abs=2e-3)
