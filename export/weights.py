"""Graphs whose weights are more than protobuf can hold in one message, 2 GB: which are, and what is passed for them."""

from __future__ import annotations

import math

from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, helper

from sfd_deploy.errors import ModelError

FILE_LIMIT = 2**31 - 2**26  # of protobuf, with room for nodes and the types of what lies between them
# Smaller ones are shapes and scalars, which tools read before they read weights.
LARGE = 1024


def weight_bytes(model: ModelProto) -> int:
    """Size of all the weights."""
    return sum(map(_size, model.graph.initializer))


def fits_one_file(model: ModelProto) -> bool:
    """Whether ``model`` can be one file, or one message's bytes."""
    return weight_bytes(model) <= FILE_LIMIT


def require_one_file(model: ModelProto, name: str, reader: str, mend: str) -> None:
    """Refuse a graph that ``reader``, which takes one file's bytes, cannot be given.

    Raises:
        ModelError: with its size.
    """
    if not fits_one_file(model):
        raise ModelError(
            f"{name}: {weight_bytes(model) / 1e9:.2f} GB of weights, and {reader} takes graphs of 2 GB at most", mend
        )


def is_large(tensor: TensorProto) -> bool:
    """Whether ``tensor`` is a weight that need not be in the graph's own file."""
    return _size(tensor) >= LARGE


def typed_stand_in(model: ModelProto) -> ModelProto:
    """What tools that read shapes and types are given: ``model``, or above the limit one that is fed its weights."""
    if fits_one_file(model):
        return model
    light = without_weights(model)
    for tensor in model.graph.initializer:
        if is_large(tensor):
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            light.graph.initializer.append(tensor)
    return light


def without_weights(model: ModelProto) -> ModelProto:
    """A copy without initializers, which are not copied on the way."""
    bare = ModelProto()
    _copy_fields(model, bare, but="graph")
    _copy_fields(model.graph, bare.graph, but="initializer")
    return bare


def _copy_fields(source: Message, target: Message, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, str | int):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _size(tensor: TensorProto) -> int:
    size: int = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size
