"""Errors a user can mend: what was wrong, where, the mend, and the exit code it maps to."""

from __future__ import annotations

from pathlib import Path

OK = 0
FAILED = 1
BAD_INPUT = 2
INCONCLUSIVE = 3
BUG = 70
INTERRUPTED = 130


class SfdError(Exception):
    """One line for a person: what was wrong and where, then the mend.

    ``exit_code`` is 2 (bad usage or input) unless a subclass says otherwise; ``cli/main.py`` alone
    prints it and exits.
    """

    exit_code = BAD_INPUT

    def __init__(self, what: str, mend: str) -> None:
        self.what = " ".join(what.split())
        self.mend = " ".join(mend.split())
        super().__init__(f"{self.what}; {self.mend}")


class ConfigError(SfdError):
    """A config file, key or value that cannot be used."""


class LabelError(SfdError):
    """A label or class name that does not exist, or forget and override labels that contradict."""


class PromptError(SfdError):
    """A prompt, or a file of them, that cannot be used, or a concept that is not in it."""


class DataError(SfdError):
    """A data set that is missing, unreadable, or not what it claims to be."""


class ModelError(SfdError):
    """A model folder of a layout, network or parameterisation that cannot be used."""


class DigestError(SfdError):
    """A file's bytes are not the ones its manifest recorded."""

    def __init__(self, file: Path, recorded: str, found: str) -> None:
        super().__init__(
            what=f"{file}: sha256 is {found[:12]}, its manifest says {recorded[:12]}",
            mend="restore the file or make it again with the stage that wrote it",
        )


class ManifestError(SfdError):
    """A folder without a readable manifest, or with files its manifest does not match."""


class RunError(SfdError):
    """A run folder that is missing, incomplete, or would be overwritten."""


class BackendError(SfdError):
    """A back end that is not installed or cannot run on this machine."""


class GraphError(SfdError):
    """A graph that cannot be made, parsed or built; names the node."""

    exit_code = FAILED


class LimitError(SfdError):
    """A measured figure breached its limit (parity, finiteness, range)."""

    exit_code = FAILED


class DivergedError(SfdError):
    """Training produced non-finite losses and stopped."""

    exit_code = FAILED


class ProcessError(SfdError):
    """Another process of a training ended, and this one cannot go on without it."""

    exit_code = FAILED
