"""Learning curves as a picture: how far each training's scores still are from the teacher's, by iteration."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from sfd_deploy.errors import ConfigError
from sfd_deploy.pictures import save_png

RECORD = "training.jsonl"  # in a generator's folder
GAPS = {"gap_retained": ("retained", "-"), "gap_forget": ("forget", "--")}  # key → in words, line
Points = list[tuple[int, float]]


def require_matplotlib() -> None:
    """Refuse to go on without what draws.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--curves: matplotlib is not installed", "pip install matplotlib")


def points_of(record: Path) -> dict[str, Points]:
    """(iteration, gap) by key, of the gaps that a training recorded: one that forgets nothing has no forget gap."""
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    found = {key: [(row["step"], row[key]) for row in rows if key in row] for key in GAPS}
    return {key: points for key, points in found.items() if points}


def draw(records: Mapping[str, Path], into: Path) -> None:
    """Write one PNG of all ``records`` (name → a training's record): a colour a training, forget labels dashed.

    Raises:
        RunError: the place cannot be written.
    """
    from matplotlib.figure import Figure  # late: dev alone installs it; a Figure by itself draws with Agg

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="gap of the scores", yscale="log")
    for number, (name, record) in enumerate(records.items()):
        for key, points in points_of(record).items():
            words, line = GAPS[key]
            axes.plot(*zip(*points, strict=True), line, color=f"C{number % 10}", label=f"{name}: {words} labels")
    if axes.lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    save_png(Image.open(buffer).convert("RGB"), into)
