"""Prompt families behind the seam: a condition is a family, and an image's seed picks one of its prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.latents import Latents
from sfd_deploy.probes import Families
from sfd_deploy.runtime.seam import Images, Runtime


class FamilyRuntime:
    """``runtime``, opened with ``families.texts``, asked for families: ``Families.asked`` says for which prompt."""

    def __init__(self, runtime: Runtime, families: Families) -> None:
        self.runtime, self.families = runtime, families

    @property
    def name(self) -> str:
        """The back end's."""
        return self.runtime.name

    @property
    def settings(self) -> dict[str, Any]:
        """The back end's."""
        return self.runtime.settings

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images."""
        return self.runtime.image_shape

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> Images:
        """Images (B, 3, H, W) of families ``labels`` (B,)."""
        return self.runtime.draw(latents, self.families.asked(labels, latents.seeds))

    def close(self) -> None:
        """Release the back end."""
        self.runtime.close()
