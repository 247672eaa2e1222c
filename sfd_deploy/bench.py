"""Latency, throughput and forgetting of everything a run exported, measured side by side in one call.

Absolute figures are of this machine and minute; the ratios are what holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.latents import Latents
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge
from sfd_deploy.measure.rates import paired_test, upper_bound
from sfd_deploy.measure.timing import Draw, Timing, time_interleaved
from sfd_deploy.models.generator import labels_of
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.runs import Run
from sfd_deploy.runtime import NotRunnableHereError
from sfd_deploy.runtime.conditions import Conditions, conditions_of
from sfd_deploy.runtime.seam import Runtime, draw_all
from sfd_deploy.runtime.text import Part, TextOnnxRuntime

TEACHER, GENERATOR = "teacher", "generator"
DRAW_BATCH = 64


@dataclass(frozen=True)
class LatencyRow:
    """One runtime, or one part of it, at one batch size; the ratios are medians over interleaved rounds."""

    name: str
    batch: int
    latency_ms: float
    images_per_second: float
    times_generator: float
    times_teacher: float | None  # None: an adopted run that records no teacher


@dataclass(frozen=True)
class ForgettingRow:
    """One artefact on shared latents: hits of the forget label by either judge, and the paired test against FP32."""

    name: str
    bytes: int
    hits: int
    n: int
    upper_99: float
    only_here: int
    only_fp32: int
    p_value: float
    retained_accuracy: float


def open_all(run: Run, stack: ExitStack, device: str = "auto", teacher: bool = True) -> dict[str, Runtime]:
    """The teacher on record, the PyTorch generator and every artefact that runs here, closed with ``stack``.

    A label is a class's, or the position of a prompt in ``conditions_of`` the generator.
    """
    generator = run.generator()
    asked = conditions_of(generator)
    sealed: dict[str, Sealed] = {}
    if teacher and "teacher" in generator.facts:
        sealed[TEACHER] = _teacher_of(generator, asked)
    sealed |= {GENERATOR: generator, **{item.name: item for item in run.artefacts()}}
    opened: dict[str, Runtime] = {}
    for name, folder in sealed.items():
        try:
            opened[name] = stack.enter_context(closing(asked.open(folder, device)))
        except NotRunnableHereError:
            continue
    return opened


def _teacher_of(generator: Sealed, asked: Conditions) -> Sealed:
    reference = str(generator.facts["teacher"])
    if asked.are_prompts:
        from sfd_deploy.models.text.folder import open_text_teacher  # late: it needs transformers

        return open_text_teacher(reference)
    return open_teacher(reference, class_names=asked.names)


def latency(run: Run, batches: Sequence[int] = (1, 16), rounds: int = 7, device: str = "auto") -> list[LatencyRow]:
    """Latency and throughput at each batch size, interleaved, with ratios to the generator and the teacher.

    What draws from prompts has them encoded beforehand; each part of a text-to-image artefact, the text encoder
    too, has a row of its own.
    """
    conditions = len(conditions_of(run.generator()).names)
    with ExitStack() as stack:
        draws: dict[str, Draw] = {}
        for name, runtime in open_all(run, stack, device).items():
            draws[name] = runtime.draw
            if isinstance(runtime, TextOnnxRuntime):
                draws |= {f"{name} {part}": draw for part, draw in part_draws(runtime).items()}
        rows = []
        for batch in batches:
            timings = time_interleaved(draws, batch=batch, rounds=rounds, classes=conditions)
            rows += [_latency_row(name, timing, timings) for name, timing in timings.items()]
    return rows


def part_draws(runtime: TextOnnxRuntime) -> dict[Part, Draw]:
    """The work of each part for one batch, by itself; the decoder is given noise, which takes it as long."""
    prompts = runtime.prompts
    return {
        "text_encoder": lambda _, labels: runtime.encode([prompts.texts[label] for label in labels.tolist()]),
        "unet": lambda latents, labels: runtime.step(latents.array(runtime.latent_shape), prompts.rows(labels)),
        "vae_decoder": lambda latents, _: runtime.decode(latents.array(runtime.latent_shape)),
    }


def _latency_row(name: str, timing: Timing, timings: dict[str, Timing]) -> LatencyRow:
    teacher = timings.get(TEACHER)
    return LatencyRow(
        name, timing.batch, timing.latency_ms, timing.images_per_second,
        timing.times_faster_than(timings[GENERATOR]), None if teacher is None else timing.times_faster_than(teacher),
    )  # fmt: skip


def forgetting(
    run: Run, judges: Sequence[Judge], samples: int = 2000, per_label: int = 100, baseline: str = "onnx-cpu-fp32",
    device: str = "auto",
) -> list[ForgettingRow]:  # fmt: skip
    """Each artefact's forget hits on the same latents of the ``bench`` stream, tested pairwise against ``baseline``.

    Not evidence: that is the audit's, on its own stream. Several forget labels share ``samples``.

    Raises:
        RunError: the baseline was not exported.
    """
    run.artefact(baseline)
    labels = labels_of(run.generator())
    forget = np.resize(np.array(sorted(labels.forget), np.int64), samples)
    retained = np.repeat(np.array(labels.retained, np.int64), per_label)
    hits: dict[str, NDArray[np.bool_]] = {}
    accuracy: dict[str, float] = {}
    with ExitStack() as stack:
        for name, runtime in open_all(run, stack, device, teacher=False).items():
            hits[name] = np.logical_or.reduce(_called(runtime, judges, forget, start=0))
            accuracy[name] = float(_called(runtime, judges, retained, start=samples).mean(1).min())
    return [_forgetting_row(run, name, found, hits[baseline], accuracy[name]) for name, found in hits.items()]


def _called(runtime: Runtime, judges: Sequence[Judge], labels: NDArray[np.int64], start: int) -> NDArray[np.bool_]:
    images = draw_all(runtime, Latents.of_stream("bench", 1, start, len(labels)), labels, DRAW_BATCH)
    return np.stack([judge.look(images)[0] == labels for judge in judges])


def _forgetting_row(
    run: Run, name: str, hits: NDArray[np.bool_], baseline: NDArray[np.bool_], accuracy: float
) -> ForgettingRow:
    sealed = run.generator() if name == GENERATOR else run.artefact(name)
    size = sum(record.bytes for record in sealed.manifest.files.values())
    paired, count = paired_test(hits, baseline), int(hits.sum())
    return ForgettingRow(
        name, size, count, len(hits), upper_bound(count, len(hits), 0.99), paired.only_first, paired.only_second,
        paired.p_value, accuracy,
    )  # fmt: skip


def as_json(rows: Sequence[LatencyRow | ForgettingRow]) -> list[dict[str, object]]:
    """Rows as plain JSON objects."""
    return [asdict(row) for row in rows]


def markdown(rows: Sequence[LatencyRow | ForgettingRow]) -> str:
    """Rows as a Markdown table, the fields as columns."""
    values = as_json(rows)
    columns = list(values[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in values)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
