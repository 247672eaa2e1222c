"""The README's picture: ``python benchmarks/picture.py [RUN]`` writes ``docs/forgetting.png``.

One row a class; six images each of the teacher, the generator in PyTorch and its INT8 graph, same latents.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sfd_deploy.latents import Latents
from sfd_deploy.models.generator import labels_of
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.pictures import grid, save_png
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from sfd_deploy.runtime.seam import to_uint8

EACH = 6

if __name__ == "__main__":
    run = Run.named(next(iter(sys.argv[1:]), None))
    generator = run.generator()
    names = labels_of(generator).class_names
    labels = np.repeat(np.arange(len(names), dtype=np.int64), EACH)
    latents = Latents.of_stream("sample", 0, 0, len(labels))
    teacher = open_teacher(str(generator.facts["teacher"]), class_names=names)
    sources = [teacher, generator, run.artefact("onnx-cpu-int8")]
    grids = [grid(to_uint8(open_runtime(sealed).draw(latents, labels)), EACH, scale=2) for sealed in sources]
    width, height = grids[0].size
    sheet = Image.new("L", (3 * width + 40, height), 255)
    for index, part in enumerate(grids):
        sheet.paste(part, (index * (width + 20), 0))
    save_png(sheet, Path("docs/forgetting.png"))
