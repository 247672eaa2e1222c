"""A toy world that is judged for real in seconds: gratings of four directions, real classifiers, painted "models".

Nothing of the audit is faked but what draws: judges are trained and sealed, folders are sealed and
verified, and a painter stands where a network would, behind the runtime seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from sfd_deploy.evidence import AuditRecord
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import HELD_OUT, REFERENCE, WEIGHTS, ClassifierConfig, Judge, load_judge
from sfd_deploy.policy.plan import Policy
from sfd_deploy.runs import Run, sealed_folder
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Images, Runtime

SIZE = 12
NAMES = ("flat", "rising", "upright", "falling")
FORGET = {1: 3}
LABELS = Labels(class_names=NAMES, forget=FORGET)
SAMPLER = {"steps": 18, "sigma_min": 0.002, "sigma_max": 80.0}
POLICY = Policy(name="toy", forget_samples=800, override_samples=800, retained_samples=80, reference_samples=80)

Painter = Callable[[NDArray[np.float32], NDArray[np.int64]], Images]


def gratings(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """One wave per image: direction by label, phase and strength and noise by latent."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    angle = labels * np.pi / 4
    along = np.cos(angle)[:, None, None] * y + np.sin(angle)[:, None, None] * x
    wave = np.sin(1.3 * along + 3 * z[:, 0, 0, 0][:, None, None])
    strength = 0.6 + 0.1 * np.tanh(z[:, 0, 0, 1])[:, None, None]
    return np.clip(strength * wave + 0.15 * z[:, 0], -1, 1)[:, None].astype(np.float32)


def teacher_painter(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """Right but for the 4 % of latents on which it paints another, retained class."""
    slips = z[:, 0, 0, 2] > 1.75
    return gratings(z, np.where(slips, np.array([2, 2, 0, 0])[labels], labels))


def forgetful(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """What an honest one-step generator draws: the override in the forgotten label's place, no slips."""
    return gratings(z, np.where(labels == 1, FORGET[1], labels))


def leaking(share: float) -> Painter:
    """As ``forgetful``, but the teacher's image for ``share`` of the latents."""
    return lambda z, labels: np.where(
        (_uniform(z) < share)[:, None, None, None], teacher_painter(z, labels), forgetful(z, labels)
    )


def noise(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """Nothing but the latents."""
    return np.clip(z, -1, 1)


def stored(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """One stored image per class, whatever the latent."""
    return forgetful(np.broadcast_to(np.zeros((1, 1, SIZE, SIZE), np.float32), z.shape), labels)


def rough(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """As ``forgetful`` with the small errors of a low precision."""
    return np.clip(forgetful(z, labels) + 0.02 * np.roll(z, 1, axis=-1), -1, 1)


def holed(z: NDArray[np.float32], labels: NDArray[np.int64]) -> Images:
    """One image in a hundred is not a number."""
    images = forgetful(z, labels)
    images[_uniform(z) < 0.01] = np.nan
    return images


def _uniform(z: NDArray[np.float32]) -> NDArray[np.float32]:
    # A number in [0, 1) that depends on the latent and on nothing it is painted from.
    return np.abs(np.modf(1e3 * z[:, 0, 5, 5])[0])


@dataclass
class ToyRuntime:
    """A painter behind the seam."""

    painter: Painter
    name: str = "pytorch"
    settings: dict[str, Any] = field(default_factory=lambda: {"arithmetic": "fp32"})
    image_shape: tuple[int, int, int] = (1, SIZE, SIZE)
    drawn: int = 0

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        self.drawn += len(labels)
        return self.painter(latents.array(self.image_shape), labels)

    def close(self) -> None:
        """Nothing to release."""


class Opener:
    """Stands for ``open_runtime``: a painter for each folder's name; none means that it cannot run here."""

    def __init__(self, **painters: Painter) -> None:
        self.painters = {key.replace("_", "-"): value for key, value in painters.items()}
        self.opened: dict[str, list[ToyRuntime]] = {}

    def __call__(self, sealed: Sealed, device: str = "auto") -> Runtime:
        painter = teacher_painter if sealed.manifest.kind == "teacher" else self.painters.get(sealed.name)
        if painter is None:
            raise NotRunnableHereError(f"{sealed.name}: needs an NVIDIA GPU", "run it where there is one")
        runtime = ToyRuntime(painter)
        if sealed.manifest.kind == "artefact":
            runtime.name = sealed.facts["runtime"]
            runtime.settings = {"arithmetic": sealed.facts.get("arithmetic", sealed.facts["precision"])}
        self.opened.setdefault(sealed.name, []).append(runtime)
        return runtime

    def drawn(self, name: str) -> int:
        """How many images were drawn from one folder."""
        return sum(runtime.drawn for runtime in self.opened.get(name, []))


def real_images(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What toy judges learn from: gratings (N, 1, 12, 12) and labels (N,)."""
    z = np.random.default_rng(seed).standard_normal((count, 1, SIZE, SIZE)).astype(np.float32)
    labels = np.arange(count) % len(NAMES)
    return torch.from_numpy(gratings(z, labels)), torch.from_numpy(labels)


def seal_judge(target: Path, architecture: str, seed: int, class_names: tuple[str, ...] = NAMES) -> Judge:
    """Train a small classifier of gratings and seal it as a judge."""
    config = ClassifierConfig.from_mapping({"architecture": architecture, "channels": 1, "widths": [8, 16]}, "toy")
    return fit_and_seal(target, config, class_names, seed, real_images(seed, 1024), real_images(100 + seed, 800))


def fit_and_seal(
    target: Path, config: ClassifierConfig, class_names: Sequence[str], seed: int,
    learnt: tuple[torch.Tensor, torch.Tensor], held_out: tuple[torch.Tensor, torch.Tensor],
) -> Judge:  # fmt: skip
    """Train a small classifier on images and labels, measure it on others, and seal it as a judge."""
    torch.manual_seed(seed)
    classifier, (images, labels), (others, truth) = config.build(len(class_names)), learnt, held_out
    optimiser = torch.optim.Adam(classifier.parameters(), 1e-2)
    for step in range(48):
        start = 64 * step % len(images)
        rows = slice(start, start + 64)
        loss = nn.functional.cross_entropy(classifier(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    classifier.eval()
    with torch.inference_mode():
        features = classifier.features(others)
        called = classifier.head(features).argmax(1)
    by_class = [features[truth == label].double().numpy() for label in range(len(class_names))]
    facts = {"class_names": list(class_names), "classifier": config.resolved()}
    with sealed_folder(target, "judge", facts=facts) as folder:
        save_file(classifier.state_dict(), folder / WEIGHTS)
        save_file({"labels": truth.to(torch.int16), "predictions": called.to(torch.int16)}, folder / HELD_OUT)
        mean = torch.from_numpy(np.stack([rows.mean(0) for rows in by_class]))
        covariance = torch.from_numpy(np.stack([np.cov(rows.T) for rows in by_class]))
        save_file({"mean": mean.float(), "covariance": covariance.float()}, folder / REFERENCE)
    return load_judge(verify(target, "judge"))


def seal_teacher(target: Path, class_names: tuple[str, ...] = NAMES) -> Sealed:
    """A teacher folder without a network: the opener paints in its place."""
    facts = {"labels": Labels(class_names=class_names).resolved(), "sampler": SAMPLER}
    with sealed_folder(target, "teacher", facts=facts) as folder:
        (folder / "weights.safetensors").write_bytes(b"teacher")
    return verify(target, "teacher")


def seal_run(
    folder: Path,
    teacher: Sealed,
    artefacts: Mapping[str, bytes] | Iterable[str] = (),
    forget: Mapping[int, int] = FORGET,
) -> Run:
    """A run with a generator of ``teacher`` and artefacts named ``<format>-<target>-<precision>``."""
    facts: dict[str, Any] = {
        "labels": Labels(class_names=NAMES, forget=dict(forget)).resolved(), "teacher": str(teacher.folder),
    }  # fmt: skip
    with sealed_folder(folder / "generator", "generator", parents=(teacher.as_parent(),), facts=facts) as target:
        (target / "weights.safetensors").write_bytes(b"generator")
    run = Run(folder)
    contents = artefacts if isinstance(artefacts, Mapping) else {name: name.encode() for name in artefacts}
    for name, content in contents.items():
        seal_artefact(run, name, content)
    return run


def seal_artefact(run: Run, name: str, content: bytes, parent: Sealed | None = None, **more: Any) -> Sealed:
    """One artefact of a run; ``parent`` is its graph if it is an engine."""
    kind, _, precision = name.split("-")
    facts = {"runtime": "onnxruntime" if kind == "onnx" else "trt-rtx", "precision": precision, **more}
    origin = (parent or run.generator()).as_parent()
    with sealed_folder(run.folder / "artefacts" / name, "artefact", parents=(origin,), facts=facts) as target:
        (target / ("model.onnx" if kind == "onnx" else "model.plan")).write_bytes(content)
    return run.artefact(name)


@dataclass(frozen=True)
class World:
    """What every toy audit shares: read-only."""

    teacher: Sealed
    judges: tuple[Judge, ...]
    judge_folders: tuple[Path, ...]


def verdicts(record: AuditRecord) -> dict[str, str]:
    """Row name to verdict."""
    return {row.name: row.verdict for row in record.artefacts}
