"""How models are served: what goes into every ``config.pbtxt`` beside the artefact's own facts."""

from __future__ import annotations

from pydantic import Field

from sfd_deploy.config import StageConfig


class ServingConfig(StageConfig):
    """Batching and instances of every model in a repository."""

    queue_delay_us: int = Field(500, ge=0, description="how long the batcher holds a request; a lone one waits it all")
    instances: int = Field(1, ge=1, description="copies of a model that run side by side, each with its own threads")
