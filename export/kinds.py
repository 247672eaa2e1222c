"""Which export a run asks for: of a generator that draws from class labels, or from prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfd_deploy.export import stage
from sfd_deploy.export.config import ExportConfig, TextExportConfig
from sfd_deploy.manifest import Sealed
from sfd_deploy.prompts import draws_from_prompts
from sfd_deploy.runs import Run


def export_any(
    run: Run, backends: Sequence[str], precisions: Sequence[str], settings: Mapping[str, int]
) -> list[Sealed]:
    """Compile a run of either kind; ``settings`` are the config's keys that a command line names.

    Raises:
        ConfigError: a setting that cannot be used; else as ``export_run`` and ``export_text_run``.
    """
    if draws_from_prompts(run.folder / "generator"):
        from sfd_deploy.export.text_stage import export_text_run  # late: it needs transformers

        return export_text_run(run, backends, precisions, TextExportConfig.from_mapping(settings, "command line"))
    return stage.export_run(run, backends, precisions, ExportConfig.from_mapping(settings, "command line"))
