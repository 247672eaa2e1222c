"""What a text-to-image artefact's manifest says of its three parts."""

from __future__ import annotations

from typing import Any

from sfd_deploy.export.config import Precision
from sfd_deploy.export.engine import Engine
from sfd_deploy.export.ranges import Peak
from sfd_deploy.export.text_graphs import Graphs
from sfd_deploy.manifest import Sealed
from sfd_deploy.runtime.text import GRAPH_FILE, PARTS, Part


def part_precision(part: Part, precision: Precision) -> Precision:
    """The precision of one part of an artefact of ``precision``: INT8 is the U-Net's alone."""
    return "fp32" if precision == "int8" and part != "unet" else precision


def engine_facts(engines: dict[Part, Engine], graphs: Graphs, batch: dict[str, int], parent: Sealed) -> dict[str, Any]:
    """What three engines, built from the graphs that ``parent`` holds, were built by, for and from."""
    first = engines[PARTS[0]]
    return {
        "flavour": first.flavour.name,
        "version": first.version,
        "compute_capabilities": list(first.compute_capabilities),
        "profile": {part: _profile(graphs, part, batch) for part in PARTS},
        "tf32": False,
        "onnx_digest": {part: parent.manifest.files[f"{part}/{GRAPH_FILE}"].sha256 for part in PARTS},
    }


def _profile(graphs: Graphs, part: Part, batch: dict[str, int]) -> dict[str, dict[str, list[int]]]:
    shapes = {item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim][1:]
              for item in graphs[part].graph.input}  # fmt: skip
    return {name: {kind: [size, *rest] for kind, size in batch.items()} for name, rest in shapes.items()}


def peak_facts(peak: Peak) -> dict[str, Any]:
    """The largest number of one graph, and where it stands."""
    return {"largest": peak.magnitude, "at": str(peak)}
