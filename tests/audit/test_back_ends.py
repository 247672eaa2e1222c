"""The audit on real networks and back ends. Their weights are random: mechanics and parity, never quality."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfd_deploy.audit.stage import audit_run
from sfd_deploy.evidence import ArtefactRecord
from sfd_deploy.export.stage import export_run
from sfd_deploy.labels import Labels
from sfd_deploy.manifest import verify
from sfd_deploy.models.denoiser import EdmDenoiser
from sfd_deploy.models.generator import OneStepGenerator, save_generator, save_teacher
from sfd_deploy.models.network import NetworkConfig
from sfd_deploy.runs import Run, sealed_folder
from tests.audit.toy import FORGET, NAMES, POLICY, World

SHAPE = {"image_shape": [1, 16, 16], "sigma_data": 0.5}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, ArtefactRecord]:
    """Rows of a random 16x16 generator in PyTorch and ONNX Runtime, beside its random teacher, by the real opener."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    unet = NetworkConfig(image_size=16, channels=1, block_channels=(8, 16), norm_groups=4).build(len(NAMES))
    denoiser = EdmDenoiser(unet.eval().requires_grad_(False), 0.5)
    labels = Labels(class_names=NAMES)
    teacher_facts = SHAPE | {"labels": labels.resolved(), "sampler": {"steps": 2, "sigma_min": 0.1, "sigma_max": 10.0}}
    with sealed_folder(folder / "teacher", "teacher", facts=teacher_facts) as target:
        save_teacher(denoiser, target)
    teacher = verify(folder / "teacher")
    facts = SHAPE | {"labels": Labels(class_names=NAMES, forget=FORGET).resolved(), "sigma_init": 2.5}
    with sealed_folder(
        folder / "run" / "generator", "generator", parents=(teacher.as_parent(),), facts=facts
    ) as target:
        save_generator(OneStepGenerator(denoiser, 2.5), target)
    run = Run(Path(folder / "run"))
    export_run(run, ["onnx"], ["fp32", "fp16"])
    record, _ = audit_run(run, policy=POLICY, judges=world.judges, teacher=teacher, device="cpu")
    return {row.name: row for row in record.artefacts}


def test_onnx_runtime_draws_what_pytorch_draws(rows):
    found = rows["onnx-cpu-fp32"].figures
    assert found.psnr_db > 100
    assert found.agreement > 0.99
    assert found.forget == rows["generator"].figures.forget


def test_random_weights_fail_wherever_they_run(rows):
    assert {row.verdict for row in rows.values()} == {"fail"}


def test_rows_carry_the_back_ends_own_name_and_settings(rows):
    assert rows["generator"].runtime == "pytorch"
    assert rows["onnx-cpu-fp32"].runtime == "onnxruntime"
    assert rows["onnx-cpu-fp32"].settings["provider"] == "CPUExecutionProvider"
    assert rows["onnx-cpu-fp16"].settings["arithmetic"] == "fp32"
    assert "FP32 arithmetic" in rows["onnx-cpu-fp16"].note


def test_sizes_are_those_of_the_model_alone(rows):
    # FP16 stores half of what FP32 does, less the fixed cost of the graph itself.
    assert 0.4 < rows["onnx-cpu-fp16"].bytes / rows["onnx-cpu-fp32"].bytes < 0.9
