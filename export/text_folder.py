"""Text-to-image graphs as a folder in Optimum's layout, which its ``ORTStableDiffusionPipeline`` loads.

The arithmetic of the one step is in the U-Net's graph, so the folder's scheduler is a stock one that adds
nothing: a DDIM step of a network that predicts the clean sample ends at just that.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sfd_deploy.export.graph_file import write_graph
from sfd_deploy.export.text_graphs import Graphs, with_unread_timestep
from sfd_deploy.models.folder import read_json
from sfd_deploy.models.text.folder import TOKENIZER_FILES
from sfd_deploy.prompts import PROMPTS_FILE
from sfd_deploy.runs import write_json
from sfd_deploy.runtime.text import GRAPH_FILE, Part

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# Each part's folder in the artefact, and in the generator it is made from.
SOURCES: dict[Part, str] = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}


def write_pipeline(graphs: Graphs, generator: Path, schedule: DDIMScheduler, folder: Path) -> None:
    """Write ``graphs`` with the other files of the ``generator`` folder that they were made from."""
    scheduler = passing_scheduler(schedule)
    scheduler.save_pretrained(folder / "scheduler")
    for part, graph in graphs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_graph(with_unread_timestep(graph) if part == "unet" else graph, folder / part / GRAPH_FILE)
        write_json(folder / part / "config.json", part_config(part, generator))
    index = read_json(generator / "model_index.json") | {"scheduler": ["diffusers", type(scheduler).__name__]}
    write_json(folder / "model_index.json", index)
    copy_words(generator, folder)


def copy_words(generator: Path, folder: Path) -> None:
    """Copy the tokenizer and the prompts that the generator was trained with."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (generator / "tokenizer" / name).is_file():
            shutil.copyfile(generator / "tokenizer" / name, folder / "tokenizer" / name)
    shutil.copyfile(generator / PROMPTS_FILE, folder / PROMPTS_FILE)


def part_config(part: Part, generator: Path) -> dict[str, object]:
    """The network's own config, as pipelines read it."""
    config: dict[str, object] = read_json(generator / SOURCES[part] / "config.json")
    # The decoder's graph divides by it; a pipeline must not divide again.
    return config | {"scaling_factor": 1.0} if part == "vae_decoder" else config


def passing_scheduler(schedule: DDIMScheduler) -> DDIMScheduler:
    """A stock scheduler whose single step takes latents as they are and ends at what the network gives."""
    from diffusers import DDIMScheduler

    scheduler: DDIMScheduler = DDIMScheduler.from_config(
        schedule.config, prediction_type="sample", timestep_spacing="trailing", set_alpha_to_one=True,
        clip_sample=False, thresholding=False, steps_offset=1,
    )  # fmt: skip
    return scheduler
