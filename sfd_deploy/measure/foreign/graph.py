"""``kind: onnx``: any ONNX classifier, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sfd_deploy.errors import ManifestError, ModelError
from sfd_deploy.measure.foreign.config import NetworkConfig
from sfd_deploy.measure.foreign.network import NetworkSight
from sfd_deploy.runtime.ort import open_session

DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
FLOATS = {*DTYPES, "tensor(double)"}


class OnnxJudge(NetworkConfig):
    """A graph with one image input; outputs go by their names in the graph."""

    kind: Literal["onnx"] = Field(description="an ONNX graph")

    def files(self, source: Path) -> dict[str, Path]:
        return {source.name: source} | {name: source.parent / name for name in external_files(source)}

    def open(self, model: Path) -> NetworkSight:
        external_files(model)  # again: somebody else may have sealed the folder, and weights outside it have no digest
        session = _session(model)
        name, dtype, batch, size = _image_input(session, self)
        # Others are no scores: sequences and maps of exporters of other libraries, strings, whole numbers.
        outputs = [output.name for output in session.get_outputs() if output.type in FLOATS]

        def run(inputs: Tensor) -> dict[str, Tensor]:
            try:
                found = session.run(outputs, {name: inputs.to(dtype).numpy()})
            except runtime_errors() as error:
                raise ModelError(f"it does not run ({first_line(error)})", "mend `pixels`") from None
            return {output: torch.from_numpy(values) for output, values in zip(outputs, found, strict=True)}

        return NetworkSight(self, run, size, batch)


def external_files(source: Path) -> list[str]:
    """Names of the files beside a graph that hold its larger tensors.

    Raises:
        ModelError: not a graph, or a file that is missing or lies elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        graph = onnx.load(source, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ModelError(f"not a readable ONNX graph ({type(error).__name__})", "give a .onnx file") from None
    names = sorted({ExternalDataInfo(tensor).location for tensor in _tensors(graph) if uses_external_data(tensor)})
    for name in names:
        parts = PurePosixPath(name)
        # A graph from elsewhere could otherwise have any file of this machine copied into the folder.
        if parts.is_absolute() or ".." in parts.parts or name == source.name:
            raise ModelError(f"its weights in {name} lie outside its folder", "save them beside the graph")
        if not (source.parent / name).is_file():
            raise ModelError(f"{name}, which holds its weights, is missing", "put it beside the graph")
    return names


def _tensors(graph: Any) -> list[Any]:
    """Every stored tensor: initialisers, constants, and those of branches and loops."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                found += _tensors(inner)
    return found


def _session(model: Path) -> Any:
    try:
        # What --threads says counts here too.
        return open_session(model, "cpu", torch.get_num_threads())
    except ManifestError as error:
        raise ModelError(error.what, "give a graph of standard operators that ONNX Runtime loads") from None


def _image_input(session: Any, config: OnnxJudge) -> tuple[str, torch.dtype, int | None, Any]:
    """Name, type, fixed batch and fixed (height, width) of the one input."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs)
        raise ModelError(f"{len(inputs)} inputs ({names}); a judge has one, the image", "export it with one")
    name, kind, shape = inputs[0].name, inputs[0].type, list(inputs[0].shape)
    if kind not in DTYPES:
        raise ModelError(f"input {name} is a {kind}", f"a judge takes {' or '.join(DTYPES)}")
    fixed = [size if isinstance(size, int) and size > 0 else None for size in shape]
    planes, height, width = (3, 1, 2) if config.pixels.layout == "nhwc" else (1, 2, 3)
    if len(shape) != 4 or fixed[planes] not in {None, config.pixels.count}:
        wanted = f"a batch of {config.pixels.channels} images, {config.pixels.layout}"
        raise ModelError(f"input {name} has shape {shape}, the config says {wanted}", "mend `pixels`")
    size = None if fixed[height] is None or fixed[width] is None else (fixed[height], fixed[width])
    if size is not None and config.pixels.size not in {None, size}:
        raise ModelError(f"its images are {size}, the config says {config.pixels.size}", "leave `size` out")
    return name, DTYPES[kind], fixed[0], size


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph or an input that it cannot take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def first_line(error: Exception) -> str:
    """An error's first line, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
