"""Open whatever draws as a ``Runtime``; back ends are imported only when one is opened."""

from __future__ import annotations

from sfd_deploy.errors import BackendError
from sfd_deploy.manifest import Sealed
from sfd_deploy.runtime.seam import Runtime


class NotRunnableHereError(BackendError):
    """An artefact that is whole, but that no back end of this machine can run."""


def open_runtime(sealed: Sealed, device: str = "auto") -> Runtime:
    """The back end for a verified teacher, generator or artefact.

    Raises:
        NotRunnableHereError: an engine, and this machine lacks its GPU or library.
        BackendError: a back end that is not installed.
    """
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
