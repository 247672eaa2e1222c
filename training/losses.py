"""SFD losses as pure functions: tensors in, tensors out; no config, device or logging.

Notation: x generated image; phi teacher, psi fake score; x_phi, x_psi their clean-image
predictions at the re-noised x. Images are float (B, C, H, W), sigma (B,); every loss is one value
per row (B,), which the caller weights and adds up.
"""

from __future__ import annotations

from torch import Tensor

# Official code, losses.py: keeps omega's division finite where the teacher already agrees.
OMEGA_FLOOR = 1e-5


def score_gap_loss(x: Tensor, x_phi: Tensor, x_psi: Tensor, alpha: float) -> Tensor:
    """The SiD generator loss before per-sample scaling: sum[(x_phi - x_psi) * ((x_phi - x) - alpha (x_phi - x_psi))].

    At an exact fake score its value is (1 - alpha) times the Fisher divergence: no progress measure.
    Its gradient is exactly half the divergence's at alpha = 1/2 (SiD, arXiv 2404.04057).
    """
    gap, error = (x_phi - x_psi).flatten(1), (x_phi - x).flatten(1)
    return (gap * (error - alpha * gap)).sum(1)


def sid_loss(x: Tensor, x_phi: Tensor, x_psi: Tensor, alpha: float = 1.2) -> Tensor:
    """Generator loss: ``score_gap_loss / omega`` with omega = mean|x_phi - x| per sample.

    Forget rows (SFD, arXiv 2409.11219): x_phi at the override label, x_psi at the forget label.
    Gradients reach x directly and through both predictions.
    """
    return score_gap_loss(x, x_phi, x_psi, alpha) / _omega(x, x_phi)


def diff_instruct_loss(x: Tensor, x_phi: Tensor, x_psi: Tensor) -> Tensor:
    """Generator loss whose gradient is ``-(x_phi - x_psi) / omega`` on x: the reverse Kullback-Leibler direction.

    Diff-Instruct (arXiv 2305.18455), the official code's ``use_diffinst``. Only x carries gradient. It is
    linear in x_psi, so the fake score's own noise averages out; ``sid_loss`` holds its square, which does not.
    """
    gap = (x_phi - x_psi).detach()
    return (gap * (x_psi.detach() - x)).flatten(1).sum(1) / _omega(x, x_phi)


def _omega(x: Tensor, x_phi: Tensor) -> Tensor:
    # Detached: it evens out the scale over sigma; its gradient would change the objective.
    return (x_phi - x).detach().flatten(1).abs().mean(1).clamp_min(OMEGA_FLOOR)


def fake_score_loss(x: Tensor, x_psi: Tensor, fit_weight: Tensor) -> Tensor:
    """Denoising loss that keeps psi at the generator's own distribution: weighted squared error, summed.

    ``fit_weight`` (B,) is the network's own, ``Denoiser.fit_weight``. x is detached: the fake score follows
    the generator, it does not pull it.
    """
    return fit_weight * (x_psi - x.detach()).square().flatten(1).sum(1)


def gap_energy(x_phi: Tensor, x_psi: Tensor) -> Tensor:
    """Mean squared score gap per value: estimates the divergence itself, the true measure of progress."""
    return (x_phi - x_psi).detach().square().flatten(1).mean(1)
