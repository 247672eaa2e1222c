"""The teacher's reference samples: slow to draw, so sealed beside the run and used again while nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from sfd_deploy.audit.samples import Samples, draw
from sfd_deploy.errors import DigestError, ManifestError
from sfd_deploy.manifest import MANIFEST, Sealed, digest_of, host_facts, verify
from sfd_deploy.policy.plan import Plan
from sfd_deploy.runs import sealed_folder
from sfd_deploy.runtime.seam import Runtime

IMAGES = "images.safetensors"


def teacher_reference(folder: Path, teacher: Sealed, runtime: Runtime, plan: Plan) -> Samples:
    """The plan's teacher cells, from ``folder`` if it holds just these, else drawn and sealed there.

    Raises:
        ManifestError: the sealed samples were changed; names the file.
    """
    key = _key(teacher, runtime, plan)
    if (folder / MANIFEST).is_file():
        sealed = _verified(folder)
        if sealed.facts["key"] == key:
            images = load_file(folder / IMAGES)["images"]
            return Samples(plan.teacher_cells, images, float(sealed.facts["images_per_second"]))
    samples = draw(runtime, plan, plan.teacher_cells, "teacher reference")
    facts = {"key": key, "images_per_second": samples.images_per_second, "images": len(samples.images)}
    with sealed_folder(folder, "reference", parents=(teacher.as_parent(),), config=plan.resolved(), seed=plan.seed,
                       facts=facts) as target:  # fmt: skip
        save_file({"images": samples.images}, target / IMAGES)
    return samples


def _key(teacher: Sealed, runtime: Runtime, plan: Plan) -> dict[str, Any]:
    # Machine and threads are in it because the speed that artefacts are compared with is in the folder too.
    return {
        "teacher": teacher.digest, "plan": plan.digest, "settings": dict(runtime.settings),
        "host": digest_of(host_facts()), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _verified(folder: Path) -> Sealed:
    try:
        return verify(folder, "reference")
    except (DigestError, ManifestError) as error:
        raise ManifestError(error.what, f"remove {folder}; the next audit draws it again") from None
