"""The ``sfd-deploy`` command: finds commands late, prints errors once, maps them to exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import click

from sfd_deploy import errors

COMMANDS = ("teacher", "judge", "train", "adopt", "export", "audit", "serve", "bench", "sample", "info", "doctor",
            "demo")  # fmt: skip


class LateGroup(click.Group):
    """Imports a command's module only when that command is asked for, or its one-line help listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"sfd_deploy.cli.{cmd_name}"), cmd_name)  # type: ignore[no-any-return]


@click.group(cls=LateGroup, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="Example: sfd-deploy demo")  # fmt: skip
@click.version_option(metadata.version("sfd-deploy"), prog_name="sfd-deploy")
def main() -> None:
    """Make a one-step generator that has forgotten a class, compile it, prove it, serve it."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: run a command and exit with its documented code."""
    sys.exit(exit_code_of(arguments))


def exit_code_of(arguments: Sequence[str] | None = None) -> int:
    """Run a command; report an error in one line on stderr and return the exit code."""
    # diffusers decorates CUDA autocast at import and warns of it on a machine without a GPU.
    warnings.filterwarnings("ignore", message="CUDA is not available", category=UserWarning)
    # optimum comes as two distributions, which diffusers finds worth a warning at import.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    try:
        result = main.main(args=arguments, prog_name="sfd-deploy", standalone_mode=False)
    except errors.SfdError as error:
        _say(f"error: {error.what}\n  mend: {error.mend}")
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return errors.BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except Exception as error:
        if _was_interrupted(error):
            return _interrupted()
        _say(f"error: a bug in sfd-deploy ({type(error).__name__}); the traceback is in {_log_traceback()}")
        return errors.BUG
    return result if isinstance(result, int) else errors.OK


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C lies behind an error: packages that are interrupted at import raise their own."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__cause__ or error.__context__)
    )


def _interrupted() -> int:
    _say("interrupted; what was finished is kept, run the same command to go on")
    return errors.INTERRUPTED


def _say(text: str) -> None:
    click.echo(text, err=True)


def _log_traceback() -> Path:
    path = Path(os.environ.get("SFD_DEPLOY_LOG", "sfd-deploy.log"))
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(traceback.format_exc())
    except OSError:
        logging.getLogger("sfd_deploy").exception("a bug, and no log to write it to")
        return Path("stderr")
    return path
