"""Open whatever draws as a ``Runtime``; back ends are imported only when one is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfd_deploy.errors import BackendError
from sfd_deploy.manifest import Sealed
from sfd_deploy.prompts import draws_from_prompts, prompts_in
from sfd_deploy.runtime.seam import Runtime

if TYPE_CHECKING:
    from sfd_deploy.models.text.sampler import TextSampler


class NotRunnableHereError(BackendError):
    """An artefact that is whole, but that no back end of this machine can run."""


def open_runtime(sealed: Sealed, device: str = "auto") -> Runtime:
    """The back end for a verified teacher, generator or artefact.

    A text-to-image generator or artefact is asked for the prompts that it was trained with, by number.

    Raises:
        NotRunnableHereError: an engine, and this machine lacks its GPU or library.
        BackendError: a back end that is not installed.
        RunError: a text-to-image folder that records no prompts.
    """
    if sealed.manifest.kind in {"generator", "artefact"} and draws_from_prompts(sealed.folder):
        return open_text_runtime(sealed, prompts_in(sealed.folder).texts, device)
    if sealed.manifest.kind == "teacher":
        from sfd_deploy.models.generator import load_teacher
        from sfd_deploy.models.sampler import SamplerConfig
        from sfd_deploy.runtime.pytorch import TeacherRuntime, torch_device

        sampler = SamplerConfig.from_mapping(sealed.facts["sampler"], str(sealed.folder))
        return TeacherRuntime(load_teacher(sealed), sampler, torch_device(device))
    if sealed.manifest.kind == "generator":
        from sfd_deploy.models.generator import load_generator
        from sfd_deploy.runtime.pytorch import GeneratorRuntime, torch_device

        return GeneratorRuntime(load_generator(sealed), torch_device(device))
    if sealed.facts["runtime"] == "onnxruntime":
        from sfd_deploy.runtime.ort import OnnxRuntime

        return OnnxRuntime(sealed.folder / "model.onnx", sealed.facts["precision"], device)
    from sfd_deploy.runtime.trt import TensorRtRuntime

    return TensorRtRuntime(sealed)


def open_text_runtime(
    sealed: Sealed, texts: Sequence[str], device: str = "auto", sampler: TextSampler | None = None
) -> Runtime:
    """The back end for a verified text-to-image model, asked for any ``texts`` by position.

    ``sampler`` is how a teacher draws; left out, as its manifest says.

    Raises:
        NotRunnableHereError: an engine, and this machine lacks its GPU or library.
        BackendError: a back end that is not installed.
        PromptError: a text is longer than the text encoder reads; an artefact says so when it is asked for.
        ConfigError: a teacher cannot draw in so many steps.
    """
    if sealed.manifest.kind == "teacher":
        from sfd_deploy.models.text.sampler import TextSampler, load_guided_teacher
        from sfd_deploy.runtime.pytorch import torch_device
        from sfd_deploy.runtime.text_pytorch import TextTeacherRuntime

        teacher = load_guided_teacher(sealed, texts, sampler or TextSampler.of(sealed))
        return TextTeacherRuntime(teacher, torch_device(device))
    if sealed.manifest.kind == "generator":
        from sfd_deploy.models.text.generator import load_text_generator
        from sfd_deploy.runtime.pytorch import torch_device
        from sfd_deploy.runtime.text_pytorch import TextGeneratorRuntime

        return TextGeneratorRuntime(load_text_generator(sealed, texts), torch_device(device))
    if sealed.facts["runtime"] == "onnxruntime":
        from sfd_deploy.runtime.text import TextOnnxRuntime

        return TextOnnxRuntime(sealed.folder, sealed.facts["precision"], texts, device)
    from sfd_deploy.runtime.text_trt import TextTensorRtRuntime

    return TextTensorRtRuntime(sealed, texts)
