"""``kind: torchscript``: a classifier saved by ``torch.jit.save``, run by PyTorch on the CPU.

A TorchScript archive is a program. It cannot call Python, but operators of its language write and read files,
and ``__setstate__`` runs while it is loaded. PyTorch has no safe way of loading one and advises to treat it as
code: so the config must say that whoever made it is trusted, and a program that names such an operator is
refused before it is loaded. That is a fence against the plain case, not a sandbox.
"""

from __future__ import annotations

import ast
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sfd_deploy.errors import ModelError
from sfd_deploy.measure.foreign.config import NetworkConfig
from sfd_deploy.measure.foreign.network import NetworkSight

# aten::save(item, filename) and aten::from_file(filename, ...): all of torch 2.13's operators that take a file's name.
FILE_OPERATORS = {"save", "from_file"}
# `ops.NAME` is where operators of other libraries are, and PyTorch's own that talk to files or other processes.
NAMESPACES = {"prim", "quantized"}
MOST_SOURCE_BYTES = 2**24


class TorchScriptJudge(NetworkConfig):
    """Outputs go by their keys if it gives a dictionary, by "0", "1", … if it gives a tuple."""

    kind: Literal["torchscript"] = Field(description="a TorchScript program")
    trusted: bool = Field(
        False, validate_default=True, description="whether you trust who made it, as you would a program"
    )

    @field_validator("trusted")
    @classmethod
    def must_be_trusted(cls, trusted: bool) -> bool:
        if not trusted:
            raise ValueError("a TorchScript file is a program: say `true` if you trust who made it, else use ONNX")
        return trusted

    def files(self, source: Path) -> dict[str, Path]:
        require_plain_program(source)
        return {source.name: source}

    def open(self, model: Path) -> NetworkSight:
        require_plain_program(model)  # again: somebody else may have sealed the folder
        module = _load(model)

        def run(inputs: Tensor) -> dict[str, Tensor]:
            try:
                # Unoptimised: a second call of the same images must not be compiled to other roundings.
                with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # its stub lacks it
                    return named(module(inputs))
            except RuntimeError as error:
                raise ModelError(f"it does not run ({_last_line(error)})", "mend `pixels`") from None

        return NetworkSight(self, run)


def require_plain_program(archive: Path) -> None:
    """Refuse a program that names a file operator or another library's operators.

    Raises:
        ModelError: naming it; or not such an archive.
    """
    for name, source in _sources(archive):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ModelError(f"its {name} cannot be read", "save it again with torch.jit.save") from None
        if found := sorted(set(_suspicious(tree))):
            raise ModelError(
                f"its program names {found[0]}, which a classifier needs not", "export the model as ONNX instead"
            )


def _sources(archive: Path) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if not any(member.filename.endswith("/constants.pkl") for member in members):
                raise ModelError("not a TorchScript archive", "save the model with torch.jit.save")
            programs = [member for member in members if member.filename.endswith(".py")]
            if sum(member.file_size for member in programs) > MOST_SOURCE_BYTES:
                raise ModelError(f"its program is over {MOST_SOURCE_BYTES} bytes", "export it as ONNX")
            for member in programs:
                yield member.filename, opened.read(member).decode()
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, zlib.error, RuntimeError):  # the last: encrypted
        raise ModelError("not a TorchScript archive", "save the model with torch.jit.save") from None


def _suspicious(tree: ast.Module) -> Iterator[str]:
    """Any mention counts, a string too: a name can be given another name first, or be asked for with getattr."""
    allowed = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
            allowed += node.attr in NAMESPACES
        word = getattr(node, {ast.Attribute: "attr", ast.Name: "id", ast.Constant: "value"}.get(type(node), ""), None)
        if word in FILE_OPERATORS:
            yield str(word)
    if sum(isinstance(node, ast.Name) and node.id == "ops" for node in ast.walk(tree)) > allowed:
        yield f"operators beyond PyTorch's {', '.join(sorted(NAMESPACES))}"


def _load(model: Path) -> Any:
    with warnings.catch_warnings():
        # TorchScript is deprecated for making models; models that exist can be read in no other way.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
        try:
            return torch.jit.load(str(model), map_location="cpu").eval()
        except RuntimeError as error:
            raise ModelError(f"it cannot be loaded ({_last_line(error)})", "save it again") from None


def named(found: Any) -> dict[str, Tensor]:
    """What a program gave, by name: a tensor is "0".

    Raises:
        ModelError: something else than tensors.
    """
    several = found if isinstance(found, (tuple, list)) else [found]
    values = found if isinstance(found, dict) else dict(enumerate(several))
    if not all(isinstance(value, Tensor) for value in values.values()):
        raise ModelError(f"it gives a {type(found).__name__}, not tensors", "let it give a tensor, or several")
    return {str(name): value for name, value in values.items()}


def _last_line(error: RuntimeError) -> str:
    # A TorchScript error's first lines are its own traceback.
    return (str(error).strip().splitlines() or ["no reason given"])[-1]
