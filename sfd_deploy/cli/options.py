"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 160

run_argument = click.argument("run", required=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document for machines.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
DATA_HELP = "IDX files, class sub-folders (optionally below train/ and test/), or the word digits."
data_option = click.option("--data", type=click.Path(path_type=Path), required=True, help=DATA_HELP)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="CPU threads of PyTorch; left out, its own choice."
)


def use_threads(threads: int | None) -> None:
    """Limit PyTorch's CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def show(value: Any, as_json: bool, people: Callable[[Console], None]) -> None:
    """Print ``value`` as one JSON document, or let ``people`` print it for a person."""
    if as_json:
        click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        console = Console()
        # A pipe or a log has no width: wrapping at 80 columns would only break tables.
        people(console if console.is_terminal else Console(width=LOG_WIDTH))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table; the first column is left-aligned, the others right-aligned."""
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        # Names are never broken: they are what is typed next.
        drawn.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text: "[gpu]" is no markup
    return drawn
