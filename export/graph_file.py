"""A graph to its file, above protobuf's limit with weights in a second one, ``model.onnx_data``: Optimum's name."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto, TensorProto, numpy_helper

from sfd_deploy.export.graph import to_bytes
from sfd_deploy.export.weights import fits_one_file, is_large, without_weights

DATA = "_data"  # behind the graph's file name
PAGE = 4096  # weights begin at a page of memory, so that a reader can map them


def write_graph(model: ModelProto, file: Path) -> None:
    """Write ``model`` to ``file``, and what does not fit to ``file`` + ``_data``; equal graphs give equal bytes."""
    if fits_one_file(model):
        file.write_bytes(to_bytes(model))
        return
    beside = file.with_name(f"{file.name}{DATA}")
    light = without_weights(model)
    with beside.open("wb") as stream:
        light.graph.initializer.extend(
            _written(tensor, stream, beside.name) if is_large(tensor) else tensor for tensor in model.graph.initializer
        )
    file.write_bytes(to_bytes(light))


def _written(tensor: TensorProto, stream: BinaryIO, name: str) -> TensorProto:
    """``tensor`` as a place in the file ``name``, after its numbers were written to it."""
    stream.write(bytes(-stream.tell() % PAGE))
    place = {"location": name, "offset": stream.tell()}
    place["length"] = stream.write(numpy_helper.to_array(tensor).tobytes())
    placed = TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
    )
    for key, value in place.items():
        placed.external_data.add(key=key, value=str(value))
    return placed
