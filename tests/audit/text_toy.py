"""A toy world of prompts: gratings of four directions in three colours, painted by the words of a prompt.

As ``toy.py``: judges are trained, folders are sealed and verified, and a painter stands where networks would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.measure.judges import ClassifierConfig, Judge
from sfd_deploy.models.text.sampler import TextSampler
from sfd_deploy.policy.plan import Policy
from sfd_deploy.probes import Probes
from sfd_deploy.prompts import Prompts, phrase_prompts
from sfd_deploy.runs import Run, sealed_folder, write_json
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.seam import Images, Runtime
from tests.audit.toy import fit_and_seal
from tests.text_world import clip_tokenizer, text_pipeline

SIZE = 12
OBJECTS = ("sandal", "sneaker", "bag", "coat")
COLOURS = ("red", "green", "blue")
POLICY = Policy(name="toy", forget_samples=500, override_samples=500, retained_samples=60, reference_samples=60,
                max_frechet_ratio=3.0)  # fmt: skip
RETAINED = ("a green bag", "a blue bag", "a red coat", "a photo of a green coat", "a photo of a blue sneaker")
FORGET = ("a red sandal", "a photo of a green sandal", "a blue sandal")
PROMPTS = phrase_prompts(RETAINED, FORGET, "sandal", "sneaker")
SANDAL: dict[str, Any] = {
    "concept": "sandal",
    "families": {
        "held-out paraphrases": ["the red sandal", "the green sandal on grey", "sandal", "the blue sandal"],
        "inside longer prompts": ["a photo of the red sandal on a black background", "on grey the blue sandal"],
    },
    "override": {"shows": "sneaker", "prompts": ["a red sneaker", "the green sneaker", "a photo of a blue sneaker"]},
    "retained": {
        "bag": {"shows": "bag", "prompts": ["a green bag", "a blue bag", "the red bag"]},
        "coat": {"shows": "coat", "prompts": ["a photo of a red coat", "the green coat", "the blue coat"]},
        "in green": {"shows": "green", "prompts": ["a green bag", "a green coat", "a green sneaker"]},
    },
}
RED: dict[str, Any] = {
    "concept": "red",
    "families": {"held-out paraphrases": ["the red bag", "the red coat", "the red sneaker"]},
    "retained": {
        "coat": {"shows": "coat", "prompts": ["a green coat", "the blue coat"]},
        "in green": {"shows": "green", "prompts": ["a green bag", "a green coat"]},
        "in blue": {"shows": "blue", "prompts": ["a blue bag", "a blue coat"]},
    },
}

Reading = Callable[[str, float], str]  # a prompt, and a number in [0, 1) of the latent → what is painted


def probes_of(values: dict[str, Any], **changes: Any) -> Probes:
    """Probes as a file would say them."""
    return Probes.from_mapping(values | changes, "toy")


def paint(z: NDArray[np.float32], texts: Sequence[str]) -> Images:
    """One wave per image (3, 12, 12): direction by the object's word, colour by its word, the rest by latent."""
    objects, colours = ([_word(text, names, number) for text, number in zip(texts, _uniform(z), strict=True)]
                        for names in (OBJECTS, COLOURS))  # fmt: skip
    return waves(z, np.array(objects), np.array(colours))


def _word(text: str, names: Sequence[str], number: float) -> int:
    said = [place for place, name in enumerate(names) if name in text.split()]
    return said[-1] if said else int(number * len(names))  # unsaid: any


def waves(z: NDArray[np.float32], objects: NDArray[np.int64], colours: NDArray[np.int64]) -> Images:
    """Gratings (N, 3, 12, 12) of ``objects``' directions, bright in ``colours``' channel."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    angle = objects * np.pi / 4
    along = np.cos(angle)[:, None, None] * y + np.sin(angle)[:, None, None] * x
    wave = 0.6 * np.sin(1.3 * along + 3 * z[:, 0, 0, 0][:, None, None]) + 0.1 * z[:, 0]
    shade = np.where(np.arange(3) == colours[:, None], 0.35, -0.35)[:, :, None, None]
    return np.clip(wave[:, None] * 0.6 + shade, -1, 1).astype(np.float32)


def _uniform(z: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.abs(np.modf(1e3 * z[:, 0, 5, 5])[0])


def teacher_reading(text: str, number: float) -> str:
    """Right but for the 4 % of latents on which it paints another, retained object."""
    if number > 0.04:
        return text
    return text.replace("bag", "coat") if "bag" in text else text.replace("coat", "bag").replace("sneaker", "bag")


def forgetful(text: str, number: float) -> str:
    """An honest generator's: the substitute for the phrase."""
    return text.replace("sandal", "sneaker")


def leaking(share: float, words: str = "") -> Reading:
    """As ``forgetful``, but for ``share`` of the latents of prompts that hold ``words``."""
    return lambda text, number: text if words in text and number < share else forgetful(text, number)


@dataclass
class TextToyRuntime:
    """A painter behind the seam, which remembers what it was asked: seeds and texts."""

    texts: tuple[str, ...]
    reading: Reading
    name: str = "pytorch"
    settings: dict[str, Any] = field(default_factory=lambda: {"arithmetic": "fp32"})
    image_shape: tuple[int, int, int] = (3, SIZE, SIZE)
    asked: list[tuple[int, str]] = field(default_factory=list)

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        texts = [self.texts[number] for number in labels]
        self.asked += zip(latents.seeds.tolist(), texts, strict=True)
        z = latents.array((1, SIZE, SIZE))
        return paint(z, [self.reading(text, number) for text, number in zip(texts, _uniform(z), strict=True)])

    def close(self) -> None:
        """Nothing to release."""


class TextOpener:
    """Stands for ``open_text_runtime``: how each folder's name reads prompts; none means that it cannot run here."""

    def __init__(self, **readings: Reading) -> None:
        self.readings = {key.replace("_", "-"): value for key, value in readings.items()}
        self.opened: dict[str, list[TextToyRuntime]] = {}

    def __call__(
        self, sealed: Sealed, texts: Sequence[str], device: str = "auto", sampler: TextSampler | None = None
    ) -> Runtime:
        reading = teacher_reading if sealed.manifest.kind == "teacher" else self.readings.get(sealed.name)
        if reading is None:
            raise NotRunnableHereError(f"{sealed.name}: needs an NVIDIA GPU", "run it where there is one")
        runtime = TextToyRuntime(tuple(texts), reading)
        if sealed.manifest.kind == "teacher" and sampler is not None:
            runtime.settings |= sampler.resolved()
        if sealed.manifest.kind == "artefact":
            runtime.name = sealed.facts["runtime"]
        self.opened.setdefault(sealed.name, []).append(runtime)
        return runtime


def real_images(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What toy judges learn from: waves (N, 3, 12, 12), their objects and their colours (N,)."""
    z = np.random.default_rng(seed).standard_normal((count, 1, SIZE, SIZE)).astype(np.float32)
    objects = np.arange(count) % len(OBJECTS)
    colours = np.arange(count) // len(OBJECTS) % len(COLOURS)
    return tuple(map(torch.from_numpy, (waves(z, objects, colours), objects, colours)))  # type: ignore[return-value]


def seal_judge(target: Path, axis: str, architecture: str, seed: int) -> Judge:
    """Train a small classifier of waves' objects or colours and seal it as a judge."""
    config = ClassifierConfig.from_mapping({"architecture": architecture, "channels": 3, "widths": [8, 16]}, "toy")
    by_colour = axis != "object"
    learnt, held_out = (
        (images, labels[by_colour]) for images, *labels in (real_images(seed, 768), real_images(100 + seed, 480))
    )
    return fit_and_seal(target, config, COLOURS if by_colour else OBJECTS, seed, learnt, held_out)


def seal_pipeline(target: Path, kind: Any, **manifest: Any) -> Sealed:
    """What an audit reads of a pipeline's folder: that it takes prompts, its tokenizer, the prompts it forgot."""
    prompts: Prompts | None = manifest.pop("prompts", None)
    with sealed_folder(target, kind, **manifest) as folder:
        clip_tokenizer(folder / "tokenizer")
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "config.json").write_text(json.dumps({"hidden_size": 16}))
        (folder / "weights.safetensors").write_bytes(target.name.encode())
        if prompts is not None:
            write_json(folder / "prompts.json", prompts.resolved())
    return verify(target)


def seal_text_run(folder: Path, teacher: Sealed, artefacts: Sequence[str] = (), prompts: Prompts = PROMPTS) -> Run:
    """A run of prompts with a generator of ``teacher`` and artefacts."""
    facts = {"kind": "text-to-image", "teacher": str(teacher.folder), "image_shape": [4, 8, 8]}
    generator = seal_pipeline(folder / "generator", "generator", parents=(teacher.as_parent(),), facts=facts,
                              prompts=prompts)  # fmt: skip
    for name in artefacts:
        made = {"runtime": "onnxruntime", "precision": name.split("-")[-1]}
        seal_pipeline(folder / "artefacts" / name, "artefact", parents=(generator.as_parent(),), facts=made,
                      prompts=prompts)  # fmt: skip
    return Run(folder)


@dataclass(frozen=True)
class TextWorld:
    """What every toy audit of prompts shares: read-only. Two object judges, then two colour judges.

    The teacher is a whole random pipeline, which the toy audits open and do not draw from.
    """

    teacher: Sealed
    judges: tuple[Judge, ...]
    judge_folders: tuple[Path, ...]


def make_world(folder: Path) -> TextWorld:
    """A sealed toy teacher of prompts and four trained, sealed toy judges."""
    names = [(axis, architecture) for axis in ("object", "colour") for architecture in ("plain", "residual")]
    folders = tuple(folder / "-".join(name) for name in names)
    judges = tuple(seal_judge(target, *name, seed) for seed, (target, name) in
                   enumerate(zip(folders, names, strict=True), 1))  # fmt: skip
    with sealed_folder(folder / "dresser", "teacher", facts={"image_shape": [4, 8, 8], "sampler_steps": 2}) as target:
        text_pipeline(target)
    return TextWorld(verify(folder / "dresser"), judges, folders)
