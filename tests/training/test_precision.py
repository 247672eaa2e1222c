"""The precision that trainings are computed in: chosen by the device, recorded, kept where it is given."""

from __future__ import annotations

import pytest
import torch

from sfd_deploy.training.judge import JudgeConfig
from sfd_deploy.training.precision import autocast, computes_in_bf16, settled
from sfd_deploy.training.stage import train
from sfd_deploy.training.text_teacher.config import TextTeacherConfig
from tests.training.test_stages import config, teacher  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [({"avx2": True}, False), ({"avx512_bf16": True}, False), ({"amx_bf16": True}, True), ({}, False)],
)  # fmt: skip
def test_a_cpu_is_asked_for_bf16_only_where_that_is_faster(monkeypatch, capabilities, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_in_bf16("cpu") is found


def test_an_older_torch_that_cannot_tell_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert computes_in_bf16("cpu") is False


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_settled_in_nested_configs_too_and_what_is_given_stays(monkeypatch, native):
    monkeypatch.setattr("sfd_deploy.training.precision.computes_in_bf16", lambda device: native)
    chosen = "bf16" if native else "fp32"
    text = settled(TextTeacherConfig.load("fashion-t2i", "teacher"), "cpu")
    assert (text.precision, text.vae.precision) == (chosen, chosen)
    for given in ("bf16", "fp32"):
        judge = JudgeConfig.load("fashion-mnist-plain", "judge").model_copy(update={"precision": given})
        assert settled(judge, "cpu") == judge


@pytest.mark.parametrize("native", [True, False])
def test_auto_computes_in_what_the_device_has(monkeypatch, native):
    monkeypatch.setattr("sfd_deploy.training.precision.computes_in_bf16", lambda device: native)
    with autocast("cpu", "auto"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_a_run_records_what_it_was_computed_in(monkeypatch, tmp_path, teacher, native):  # noqa: F811
    monkeypatch.setattr("sfd_deploy.training.precision.computes_in_bf16", lambda device: native)
    run = train(config(teacher, precision="auto", iterations=1), tmp_path / "run", "cpu")
    assert run.generator().manifest.config["precision"] == ("bf16" if native else "fp32")
