"""What the loop asks of the conditions that it trains on: class labels or prompts, each a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sfd_deploy.labels import Override


class Conditions(Protocol):
    """Which conditions there are and which are forgotten; ``Labels`` and ``Prompts`` both are this."""

    @property
    def retained(self) -> tuple[int, ...]:
        """Conditions that are still drawn."""

    @property
    def forget(self) -> Mapping[int, Override]:
        """Forgotten condition → what the teacher is asked in its place."""

    def resolved(self) -> dict[str, Any]:
        """JSON values: what a checkpoint belongs to."""
