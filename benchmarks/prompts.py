"""Two concepts forgotten by prompt, before and after: ``python -m benchmarks.prompts --page docs/results.md``.

On the shipped small teacher: an object by phrase rewrite, an attribute by negative prompt. Each is trained, exported
and audited with the shipped probes. Resumable: a training goes on from its checkpoint, and what is measured is kept
as JSON. Also draws a picture of each. Exits with 1 if a criterion is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import optimum, page
from benchmarks.ledger import Ledger
from benchmarks.measured import CONFIDENCE, draw
from sfd_deploy.audit.figures import count
from sfd_deploy.audit.selection import Selection, find_teacher
from sfd_deploy.audit.stage import audit_selection
from sfd_deploy.audit.text_selection import find_family_judges
from sfd_deploy.config import StageConfig
from sfd_deploy.errors import FAILED, OK
from sfd_deploy.evidence import AuditRecord, Count, FamilyFigures
from sfd_deploy.export.config import Precision
from sfd_deploy.export.kinds import export_any
from sfd_deploy.latents import Latents
from sfd_deploy.measure.judges import Judge
from sfd_deploy.pictures import grid, save_png
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.probes import TRAINING, Families, Probes
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_text_runtime
from sfd_deploy.runtime.families import FamilyRuntime
from sfd_deploy.runtime.seam import Runtime, to_uint8
from sfd_deploy.training.kinds import load_config, run_training
from sfd_deploy.training.text_teacher.captions import OBJECTS

EXPERIMENTS = ("fashion-t2i-sandal", "fashion-t2i-red")  # presets, probes and pictures
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
HELD_OUT = "held-out paraphrases"
PROMISED = (TRAINING, HELD_OUT)  # the families that a criterion is about
MAX_BOUND = 0.01  # 99 %, one-sided
MAX_DROP = 0.03  # mean retained accuracy under the guided teacher's
TEACHER_IMAGES = 200  # a forget family, before
SHOWN = 8  # images a family in the picture
MAX_DIFFERENCE = 1e-3  # of a value, Optimum's pipeline and ours, FP32


class Before(StageConfig):
    """What the guided teacher draws for each forget family."""

    hits: dict[int, Count]


class Stock(StageConfig):
    """By precision, the largest difference between Optimum's pipeline and ours on the exported folder."""

    difference: dict[Precision, float]


@dataclass(frozen=True)
class Found:
    """One experiment's figures."""

    name: str
    before: Before
    record: AuditRecord
    stock: Stock

    @property
    def families(self) -> Families:
        """The prompt families that were asked for."""
        return families_of(self.record)

    @property
    def rows(self) -> dict[str, FamilyFigures]:
        """Figures of everything that ran, by name."""
        return {row.name: row.figures for row in self.record.artefacts if isinstance(row.figures, FamilyFigures)}

    def drop(self, figures: FamilyFigures) -> float:
        """Mean retained accuracy under the teacher's, families of objects and of colours alike."""
        return self.record.teacher.retained_accuracy - figures.retained_accuracy

    def missed(self) -> Iterator[str]:
        """Each criterion that is missed, in words."""
        names = self.families.class_names
        yield from (f"{self.name}: no family {wanted!r}" for wanted in PROMISED if wanted not in names)
        for verdict in self.record.artefacts:
            if verdict.verdict != "pass":
                yield f"{self.name}, {verdict.name}: {verdict.verdict}: {'; '.join(verdict.reasons)}"
        for row, figures in self.rows.items():
            for label, found in figures.forget_by_label.items():
                if names[label] in PROMISED and found.upper_99 > MAX_BOUND:
                    yield f"{self.name}, {row}: {names[label]}: the bound is {found.upper_99:.2%}"
            if self.drop(figures) > MAX_DROP:
                yield f"{self.name}, {row}: retained accuracy is {100 * self.drop(figures):.1f} points lower"
        if (difference := self.stock.difference["fp32"]) > MAX_DIFFERENCE:
            yield f"{self.name}: Optimum's pipeline differs from ours by {difference:.1e} in FP32"


def find(name: str, home: Path, device: str) -> Found:
    """Make, or take from ``home``, one experiment's figures."""
    run = run_training(load_config(name), home / name, device)
    probes = Probes.load(name, "probes")
    ledger = Ledger(home / "results" / name, {
        "generator": run.generator().digest, "probes": probes.resolved(), "policy": _policy().digest,
        "judges": [judge.digest for judge in find_family_judges(probes, ())],
    })  # fmt: skip
    record = ledger.result("audit", AuditRecord, lambda: _audit(run, name, device))
    before = ledger.result("before", Before, lambda: _before(run, families_of(record), name, device))
    return Found(name, before, record, ledger.result("stock", Stock, lambda: _stock(run, families_of(record))))


def families_of(record: AuditRecord) -> Families:
    """The prompt families that were asked for."""
    labels = Plan.from_mapping(record.plan, "the plan").labels
    if not isinstance(labels, Families):
        raise TypeError("an audit of class labels")
    return labels


def _audit(run: Run, name: str, device: str) -> AuditRecord:
    missing = [precision for precision in PRECISIONS if f"onnx-cpu-{precision}" not in run.artefact_names()]
    if missing:
        export_any(run, ("onnx",), missing, {})
    record, _ = audit_selection(Selection(run=run), policy=_policy(), probes=name, device=device)
    return record


def _policy() -> Policy:
    return Policy.load("fashion-t2i", "policy")


def _stock(run: Run, families: Families) -> Stock:
    """A prompt of every family."""
    prompts = [texts[0] for texts in families.prompts]
    shape = tuple(run.generator().facts["image_shape"])
    latents = Latents.of_stream("sample", 0, 0, len(prompts)).array(shape)
    return Stock(difference={
        precision: optimum.difference(run.artefact(f"onnx-cpu-{precision}").folder, precision, prompts, latents)
        for precision in PRECISIONS
    })  # fmt: skip


def _before(run: Run, families: Families, name: str, device: str) -> Before:
    judges = find_family_judges(Probes.load(name, "probes"), ())
    with closing(_opened(run, families, device)[0]) as teacher:
        return Before(hits={
            label: count(named(draw(teacher, "forget", label, TEACHER_IMAGES), families.concept, judges), CONFIDENCE)
            for label in sorted(families.forget)
        })  # fmt: skip


def named(images: NDArray[np.float32], concept: str, judges: Sequence[Judge]) -> NDArray[np.bool_]:
    """Which images (N,) at least one of the judges that know ``concept`` calls it."""
    knowing = [judge for judge in judges if concept in judge.class_names]
    hits: NDArray[np.bool_] = np.any(
        [judge.look(images)[0] == judge.class_names.index(concept) for judge in knowing], axis=0
    )
    return hits


def _opened(run: Run, families: Families, device: str) -> tuple[Runtime, Runtime]:
    """The teacher and the generator, asked for families."""
    generator = run.generator()
    teacher, drawn = (
        FamilyRuntime(open_text_runtime(sealed, families.texts, device), families)
        for sealed in (find_teacher(generator, None), generator)
    )
    return teacher, drawn


def picture(found: Found, run: Run, device: str) -> Image.Image:
    """One row a family, the teacher's images left and the generator's right, of the same prompts and latents."""
    labels = np.repeat(np.arange(found.families.count, dtype=np.int64), SHOWN)
    latents = Latents.of_stream("sample", 0, 0, len(labels))
    sheets = []
    for runtime in _opened(run, found.families, device):
        with closing(runtime):
            sheets.append(grid(to_uint8(runtime.draw(latents, labels)), SHOWN, scale=2))
    sheet = Image.new("RGB", (sheets[0].width + sheets[1].width + 20, sheets[0].height), "white")
    sheet.paste(sheets[0], (0, 0))
    sheet.paste(sheets[1], (sheets[0].width + 20, 0))
    return sheet


def forget_table(found: Found) -> str:
    """Families down; before, and for every artefact hits and bound after."""
    names = found.families.class_names
    rows = []
    for label, earlier in found.before.hits.items():
        after = [figures.forget_by_label[label] for figures in found.rows.values()]
        instead = found.rows["generator"].drawn_instead[label]
        rows.append([
            names[label], f"{100 * earlier.rate:.1f} (n = {earlier.n})",
            *(f"{one.hits} of {one.n:,} (≤ {100 * one.upper_99:.2f} %)" for one in after),
            ", ".join(f"{name} {100 * share:.1f} %" for name, share in instead.items()),
        ])  # fmt: skip
    return page.table(("forget prompts", "teacher, %", *found.rows, "drawn instead (generator)"), rows)


def retained_table(found: Found) -> str:
    """Teacher and artefacts down: accuracy of object and of colour on retained prompts, spread, Fréchet ratio."""
    families = found.families
    objects = [label for label in families.retained if families.shows[label] in OBJECTS]
    colours = [label for label in families.retained if label not in objects]
    teacher = found.record.teacher
    rows = [["guided teacher", *_accuracies(teacher.accuracy_by_label, objects, colours), "", "", "", ""]]
    for name, figures in found.rows.items():
        by_label = figures.retained_accuracy_by_label
        rows.append([
            name, *_accuracies(by_label, objects, colours), f"{100 * found.drop(figures):+.2f}",
            f"{figures.spread:.2f}", _or_nothing(figures.prompt_spread.overall), f"{figures.frechet_ratio:.2f}",
        ])  # fmt: skip
    columns = ("", "object, %", "colour, %", "mean drop, points", "spread", "of one prompt", "Fréchet, times")
    return page.table(columns, rows)


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _accuracies(by_label: dict[int, float], *groups: Sequence[int]) -> list[str]:
    return [f"{100 * fmean(by_label[label] for label in group):.2f}" for group in groups]


def text(found: Found, origin: str) -> str:
    """Both tables, and what stands below them."""
    policy = Policy.from_mapping(found.record.policy, "the record's policy")
    return "\n".join([
        forget_table(found), "", retained_table(found), "",
        f"- A hit is what either judge calls {found.families.concept}; bounds are exact, one-sided, 99 %, over a "
        f"family's prompts and latents. Criterion: at most {MAX_BOUND:.0%} for {' and '.join(PROMISED)}.",
        f"- Retained: {policy.retained_samples} images a family, the judge that agrees least. Criterion: a mean drop "
        f"of at most {100 * MAX_DROP:g} points. Spread: the least family's, over the teacher's; of one prompt: of all "
        "retained families together.",
        "- Optimum's ONNX Runtime pipeline and ours, on a prompt of every family, differ by at most "
        + ", ".join(f"{value:.1e} ({precision})" for precision, value in found.stock.difference.items())
        + f", images in [-1, 1]. Criterion: {MAX_DIFFERENCE:g} in FP32.",
        f"- {origin}.",
    ])  # fmt: skip


@click.command(epilog="Example: python -m benchmarks.prompts --threads 2")
@click.option("--only", type=click.Choice(EXPERIMENTS), help="One of the two.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/prompts"), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.")
@click.option("--pictures", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
@click.option("--page", "into", type=click.Path(path_type=Path), help="Also put the tables into this page.")
def command(
    only: str | None, output: Path, device: str, threads: int | None, pictures: Path, into: Path | None
) -> int:  # fmt: skip
    """Forget an object and an attribute by prompt; run again to go on."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    missed: list[str] = []
    for name in [only] if only else EXPERIMENTS:
        found = find(name, output, device)
        click.echo(tables := text(found, f"`python -m benchmarks.prompts`; {page.machine(torch.get_num_threads())}"))
        save_png(picture(found, Run(output / name), device), pictures / f"{name}.png")
        if into is not None:
            page.fill(into, name, tables)
        missed += found.missed()
    for line in missed:
        click.echo(f"missed: {line}", err=True)
    return FAILED if missed else OK


if __name__ == "__main__":
    page.run(command)
