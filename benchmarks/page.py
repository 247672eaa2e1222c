"""Tables as Markdown, put between their markers in a page, and how a script ends: one line a fault, the exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import click

from sfd_deploy.errors import INTERRUPTED, OK, ConfigError, SfdError
from sfd_deploy.manifest import host_facts


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_sd(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """``mean ± sd``, sample standard deviation; of one value the value."""
    mean = f"{scale * fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * stdev(values):.{digits}f}"


def machine(threads: int) -> str:
    """What a table was measured on, in words."""
    host = host_facts()
    return f"{host['processor']}, {threads} threads"


def computed_on(device: str) -> str:
    """What a table was computed on, in words: the GPU, or this machine."""
    import torch  # late: not every page needs it

    return str(torch.cuda.get_device_name()) if device == "cuda" else machine(torch.get_num_threads())


def device_flag(device: str) -> str:
    """What a table's command line says of the device."""
    return "" if device == "cpu" else f" --device {device}"


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name -->`` and ``<!-- /name -->`` of a page.

    Raises:
        ConfigError: the page has no such markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, opened, rest = found.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ConfigError(f"{page}: no {begin} … {end}", "add the two markers, or leave --page out")
    temporary = page.with_name(f".{page.name}.writing")
    temporary.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    os.replace(temporary, page)


def run(command: click.Command) -> None:
    """Run a script's command and exit: faults in one line, as ``sfd-deploy`` prints them."""
    warnings.filterwarnings("ignore", message="CUDA is not available", category=UserWarning)
    try:
        code = command.main(standalone_mode=False)
    except SfdError as error:
        click.echo(f"error: {error.what}\n  mend: {error.mend}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; what was finished is kept, run the same command to go on", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else OK)
