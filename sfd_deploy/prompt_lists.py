"""Prompt lists: text files of one prompt a line, a user's or shipped ones by name."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sfd_deploy.config import PRESETS
from sfd_deploy.errors import PromptError
from sfd_deploy.phrases import composed


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line in order; blank lines and spaces around a prompt are dropped.

    Raises:
        PromptError: missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"{file}: no such file", "give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise _not_text(file, f"byte {error.start}") from None
    except OSError as error:
        raise PromptError(f"{file}: cannot be read ({error.strerror})", "give a readable text file") from None
    if "\0" in text:
        raise _not_text(file, "a zero byte")
    # Composed, as CLIP's tokenizer has it: two spellings of one accent are one prompt.
    lines = (composed(line).strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise PromptError(f"{file}: no prompt in it", "write one prompt a line")
    return prompts


def prompt_list(name_or_file: str) -> tuple[str, ...]:
    """The prompts of a shipped list or of a text file.

    Raises:
        PromptError: no such list or file, or one that cannot be used.
    """
    shipped = shipped_lists()
    if name_or_file in shipped:
        with resources.as_file(shipped[name_or_file]) as file:
            return read_prompts(file)
    if not Path(name_or_file).exists():
        raise PromptError(
            f"{name_or_file}: no such prompt list",
            f"give a text file with one prompt a line, or one of {', '.join(sorted(shipped))}",
        )
    return read_prompts(Path(name_or_file))


def shipped_lists() -> dict[str, Traversable]:
    """The prompt lists of this package, by name."""
    return {item.name.removesuffix(".txt"): item for item in (resources.files(PRESETS) / "prompts").iterdir()}


def _not_text(file: Path, where: str) -> PromptError:
    return PromptError(f"{file}: not UTF-8 text ({where})", "save it as UTF-8")
