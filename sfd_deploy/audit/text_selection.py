"""What an audit of prompts is asked with: probes, judges, and the prompts that count as forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfd_deploy.audit.selection import latest_run, open_judges
from sfd_deploy.config import preset_names
from sfd_deploy.embedded import embedded_names, judges_knowing, resolve
from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.manifest import Sealed
from sfd_deploy.measure.judges import Judge, require_distinct_names
from sfd_deploy.probes import Probes
from sfd_deploy.prompts import Prompts, draws_from_prompts, prompts_in

PROBES = "probes"  # the presets' folder


def forget_prompts_of(sealed: Sealed) -> Prompts:
    """The prompts that a generator was trained with; a teacher is asked about the latest run that came of it.

    Raises:
        RunError: none are recorded, or there is no such run.
    """
    if sealed.manifest.kind != "teacher":
        return prompts_in(sealed.folder)
    if (run := latest_run()) is not None:
        generator = run.generator()
        if draws_from_prompts(generator.folder) and sealed.digest in _teachers(generator):
            return prompts_in(generator.folder)
    raise RunError(
        f"{sealed.folder}: forgot nothing, and the latest run was not distilled from it",
        "train one that forgets: the teacher is asked for its prompts",
    )


def find_probes(sealed: Sealed, prompts: Prompts, given: str | None) -> Probes:
    """The probes ``given`` by name or file, or the shipped ones for a shipped teacher's forgotten concept.

    Raises:
        ConfigError: nothing says which, or they cannot be used.
        PromptError: a prompt list of theirs cannot be.
    """
    if given is None:
        known = preset_names(PROBES)
        shipped = [f"{name}-{phrase}" for name in _shipped_teachers(sealed) for phrase in prompts.phrases]
        fitting = [name for name in dict.fromkeys(shipped) if name in known]
        if len(fitting) != 1:
            raise ConfigError(
                f"{sealed.folder}: draws from prompts, and nothing says which to ask for",
                f"give --probes with a file, or one of {', '.join(known)}",
            )
        given = fitting[0]
    return Probes.load(given, PROBES)


def find_family_judges(probes: Probes, given: Sequence[Path]) -> list[Judge]:
    """The judges in ``given``, or the shipped ones that know what the families show; each once.

    Raises:
        RunError: none are shipped for these classes, or a folder does not exist.
        LabelError: two different judges of one name.
    """
    judges = {judge.digest: judge for judge in open_judges(given or judges_knowing(probes.classes))}
    require_distinct_names(list(judges.values()))
    return list(judges.values())


def _teachers(sealed: Sealed) -> set[str]:
    """Digests of the teachers that a generator came of; a teacher's own."""
    if sealed.manifest.kind == "teacher":
        return {sealed.digest}
    return {parent.digest for parent in sealed.manifest.parents if parent.kind == "teacher"}


def _shipped_teachers(sealed: Sealed) -> list[str]:
    return [name for name in embedded_names() if resolve(name, "teacher").digest in _teachers(sealed)]
