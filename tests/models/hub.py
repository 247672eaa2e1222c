"""A model hub that has one snapshot, for tests of teachers by name."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "4f1c0de" * 5 + "4f1c0"


def pretend_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> list[dict[str, object]]:
    """The hub has ``folder`` as ``name`` and nothing else; returned is what it was asked for, as it is asked."""
    asked: list[dict[str, object]] = []
    snapshot = folder.rename(folder.with_name(COMMIT))

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append({"repository": repo_id, "revision": revision, "patterns": allow_patterns})
        if repo_id != name:
            raise OSError("404")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked
