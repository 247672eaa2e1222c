"""The audit report: one self-contained HTML file, pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from sfd_deploy.errors import FAILED, INCONCLUSIVE, OK
from sfd_deploy.evidence import ArtefactRecord, AuditRecord
from sfd_deploy.labels import MIXTURE, Labels
from sfd_deploy.manifest import host_facts, tool_versions
from sfd_deploy.measure.rates import allowed_hits
from sfd_deploy.pictures import grid, png_bytes
from sfd_deploy.policy.plan import Plan, Policy
from sfd_deploy.policy.verdict import override_floor, retained_floor, shortfalls
from sfd_deploy.probes import Families
from sfd_deploy.runtime.seam import Images, to_uint8

# Row name → label → its first few images (n, C, H, W); rows without pictures could not run.
Pictures = dict[str, dict[int, Images]]
YARDSTICK = "teacher (reference)"
LABELS_SHOWN = 12
PIXELS_SHOWN = 64

OUTCOMES = {
    OK: ("pass", "Every audited artefact passed."),
    FAILED: ("fail", "At least one audited artefact failed."),
    INCONCLUSIVE: ("inconclusive", "Not proved: an artefact was inconclusive or could not be run here."),
}


def render(record: AuditRecord, pictures: Pictures) -> str:
    """The whole page as HTML text."""
    labels = Plan.from_mapping(record.plan, "the plan").labels
    policy = Policy.from_mapping(record.policy, "the record's policy")
    verdict, outcome = OUTCOMES[record.exit_code]
    return _template().render(
        record=record,
        policy=policy.resolved(),  # with the defaults of keys that an older record has not
        labels=labels,
        families=isinstance(labels, Families),
        about=partial(_about, labels),
        confusions=_confusions,
        extractor=next(judge for judge in record.judges if judge["frechet_features"]),
        verdict=verdict,
        outcome=outcome,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        allowed=allowed_hits(policy.forget_samples, policy.max_forget_rate, policy.confidence),
        retained_floor=retained_floor(record.teacher, policy),
        override_floors=_floors(record, labels, policy),
        missed={row.name: missed(row, record, labels, policy) for row in record.artefacts},
        strips=_strips(pictures, labels.foremost(LABELS_SHOWN), labels, record),
        gaps=not_established(record, policy),
        host=host_facts(),
        versions=tool_versions(),
    )


def _floors(record: AuditRecord, labels: Labels, policy: Policy) -> str:
    # Of prompt families the training prompts alone owe an override, if there is one.
    owing = [label for label, override in labels.forget.items()
             if not isinstance(labels, Families) or override != MIXTURE]  # fmt: skip
    return ", ".join(f"{override_floor(record.teacher, policy, labels.overrides_of(label)):.3f}" for label in owing)


def _about(labels: Labels, label: int) -> str:
    if isinstance(labels, Families):
        return f"{len(labels.prompts[label])} prompts, shows {labels.shows[label]}"
    return f"label {label}"


def _confusions(judge: dict[str, Any], labels: Labels) -> dict[str, float]:
    """What a judge calls real images of the override class, in words; families that say the same, once."""
    found = {}
    for key, rate in judge["calls_real_override_the_forget_label"].items():
        override, forgotten = labels.override_name(int(key)), labels.class_names[int(key)]
        if isinstance(labels, Families):
            override = ", ".join(labels.shows[stand_in] for stand_in in labels.overrides_of(int(key)))
            forgotten = labels.concept
        found[f"{override} as {forgotten}"] = rate
    return found


def missed(row: ArtefactRecord, record: AuditRecord, labels: Labels, policy: Policy) -> set[str]:
    """The figures of a row that keep it from passing, by name."""
    if row.figures is None:
        return set()
    return {found.criterion for found in shortfalls(row.figures, record.teacher, labels, policy, row.precision)}


def not_established(record: AuditRecord, policy: Policy) -> list[str]:
    """What a reader might take this audit to show, and it does not; one plain sentence each."""
    absent = [row.name for row in record.artefacts if row.verdict == "not-runnable-here"]
    other = [row.name for row in record.artefacts if _arithmetic_differs(row)]
    limited = [row.name for row in record.artefacts if row.figures is not None and row.figures.limited_by_judges]
    gaps = []
    if absent:
        gaps.append(f"Nothing about {', '.join(absent)}: this machine could not run it. No figure of another row is "
                    "evidence for it, not even its own graph's.")  # fmt: skip
    if other:
        gaps.append(f"Nothing about low-precision arithmetic in {', '.join(other)}: the back end computed in another "
                    "arithmetic, so only the rounding of the weights was tested.")  # fmt: skip
    if limited:
        gaps.append(f"In {', '.join(limited)} the bound is limited by the judges: they call as many honest images of "
                    "the override label the forgotten one, so what the bound bounds is their own error.")  # fmt: skip
    families = isinstance(Plan.from_mapping(record.plan, "the plan").labels, Families)
    chosen = "prompt" if families else "label"
    if families:
        gaps.append("Each bound is over a family: prompts drawn at random from its list, and random latents. It does "
                    "not bound a single prompt, and no prompt outside the families, above all none that somebody "
                    "searched for.")  # fmt: skip
    if families and policy.min_prompt_spread == 0:
        gaps.append("That a prompt has many pictures: the limit on spread is a family's, whose prompts differ. What "
                    "is left of the teacher's variety in one prompt stands beside it; no limit is held to "
                    "it.")  # fmt: skip
    return [
        *gaps,
        "The bounds hold for independent standard-normal latents, of which the plan's are a sample. A latent that "
        "somebody searched for is not a random one: no bound here covers it.",
        f"Access was tier T0: a caller who chooses a {chosen} and nothing else. Callers who choose latents (T1), who "
        "can change the graph (T2) or train the weights (T3) were not tried; forgotten behaviour is not erased "
        "weights.",
        f"A hit is what at least one of these {len(record.judges)} judges calls the forgotten class. What no judge "
        "recognises, no judge counts.",
        "Retained quality is measured by the same judges and by statistics of the images. It is not a human's opinion, "
        "and spread does not notice a model that has a handful of stored images per class.",
    ]


def _arithmetic_differs(row: ArtefactRecord) -> bool:
    return bool(row.settings.get("arithmetic", row.precision) != row.precision)


def _strips(pictures: Pictures, shown: tuple[int, ...], labels: Labels, record: AuditRecord) -> dict[str, Any]:
    """Picture table: sources across, labels down, each cell a data URI and what it shows."""
    absent = {row.name for row in record.artefacts if row.verdict == "not-runnable-here"}
    sources = [name for name in pictures if name not in absent]
    rows = [{"about": _about(labels, label), "name": labels.class_names[label],
             "override": _override_name(labels, label),
             "cells": [_cell(pictures[source], label, source, labels.class_names[label]) for source in sources]}
            for label in shown]  # fmt: skip
    return {"sources": sources, "rows": rows}


def _override_name(labels: Labels, label: int) -> str:
    return labels.override_name(label) if label in labels.forget else ""


def _cell(images: dict[int, Images], label: int, source: str, name: str) -> dict[str, str] | None:
    if label not in images:
        return None
    return {"uri": data_uri(images[label]), "alt": f"{len(images[label])} images that {source} draws for {name}"}


def data_uri(images: Images) -> str:
    """Images (n, C, H, W) as one PNG of rows of four, in a data URI; large ones are made smaller."""
    # Holes are shown black; the verdict has them already.
    pixels = to_uint8(np.nan_to_num(images, nan=-1.0, posinf=1.0, neginf=-1.0))
    sheet = grid(pixels, columns=4)
    if images.shape[-1] > PIXELS_SHOWN:
        sheet = sheet.resize((4 * PIXELS_SHOWN, sheet.height * 4 * PIXELS_SHOWN // sheet.width), Image.Resampling.BOX)
    return "data:image/png;base64," + base64.b64encode(png_bytes(sheet)).decode()


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("sfd_deploy.audit", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["share"] = lambda value: f"{100 * value:.2f} %"
    environment.filters["size"] = lambda value: f"{value / 1e6:.2f}"
    return environment.get_template("report.html.j2")
