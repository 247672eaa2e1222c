from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfd_deploy.audit.selection import Selection
from sfd_deploy.audit.stage import audit_selection
from sfd_deploy.audit.text_selection import find_probes
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.embedded import judges_for, judges_knowing
from sfd_deploy.errors import ConfigError, RunError
from sfd_deploy.evidence import read_record
from sfd_deploy.labels import MIXTURE
from sfd_deploy.models.generator import OneStepGenerator
from sfd_deploy.models.text.generator import save_text_generator
from sfd_deploy.models.text.network import text_denoiser
from sfd_deploy.policy.plan import Policy
from sfd_deploy.prompts import negative_prompts
from sfd_deploy.runs import Run, sealed_folder, write_json
from tests.audit.text_toy import (
    COLOURS,
    OBJECTS,
    PROMPTS,
    SANDAL,
    TextOpener,
    TextWorld,
    forgetful,
    leaking,
    seal_pipeline,
    seal_text_run,
)
from tests.audit.toy import World, seal_run
from tests.text_world import text_parts

SMALL = {"name": "small", "forget_samples": 500, "override_samples": 500, "retained_samples": 60,
         "reference_samples": 60, "max_frechet_ratio": 3.0}  # fmt: skip


@pytest.fixture
def command(tmp_path: Path, text_world: TextWorld, monkeypatch: pytest.MonkeyPatch):
    """``sfd-deploy audit`` in an empty folder, with painters behind the seam, and toy judges and probes named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    write_probes(tmp_path / "probes.yaml")
    judges = [item for folder in text_world.judge_folders for item in ("--judge", str(folder))]

    def audit(*arguments: str, probes: str | None = "probes.yaml", **readings: Any) -> int:
        monkeypatch.setattr("sfd_deploy.audit.text_stage.open_text_runtime", TextOpener(**readings))
        named = [] if probes is None else ["--probes", probes]
        return exit_code_of(["audit", *arguments, *named, "--policy", "small.yaml", *judges])

    return audit


@pytest.fixture
def run(tmp_path: Path, text_world: TextWorld) -> Run:
    return seal_text_run(tmp_path / "runs" / "demo", text_world.teacher, ["onnx-cpu-fp32"])


def write_probes(file: Path, **changes: Any) -> None:
    file.write_text(yaml.safe_dump(SANDAL | changes))


def test_a_clean_run_is_zero_and_a_leaking_artefact_one(command, run, capsys):
    assert command(generator=forgetful, onnx_cpu_fp32=forgetful) == 0
    assert "report.html" in capsys.readouterr().out
    assert command("--json", generator=forgetful, onnx_cpu_fp32=leaking(0.05, "photo")) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["artefacts"]}
    assert (rows["generator"]["verdict"], rows["onnx-cpu-fp32"]["verdict"]) == ("pass", "fail")
    assert rows["onnx-cpu-fp32"]["forget"]["n"] == 500


def test_what_cannot_run_here_and_what_is_not_proved_are_three(command, run):
    assert command("onnx-cpu-fp32", generator=forgetful) == 3
    assert command("generator", generator=leaking(0.006)) == 3


def test_a_teacher_is_asked_about_the_latest_run_s_prompts_and_fails(command, run, text_world, tmp_path):
    assert command(str(text_world.teacher.folder)) == 1
    assert (tmp_path / "runs" / "audit-of-dresser" / "audit" / "report.html").is_file()
    assert not (run.folder / "audit").exists()


def test_a_teacher_without_a_run_of_its_own_has_no_prompts_to_be_asked_for(command, text_world, capsys):
    assert command(str(text_world.teacher.folder)) == 2
    assert "the latest run was not distilled from it" in capsys.readouterr().err


def test_a_run_of_another_teacher_lends_its_prompts_to_none(command, text_world, tmp_path, capsys):
    other = seal_pipeline(tmp_path / "other", "teacher", facts={})
    seal_text_run(tmp_path / "runs" / "demo", other)
    assert command(str(text_world.teacher.folder)) == 2
    assert "the latest run was not distilled from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({"concept": "sandle"}, [], "did you mean sandal"),
        ({"families": {"held-out": ["a red " * 9]}}, [], "tokens"),
        ({"families": {"held-out": []}}, [], "at least one prompt"),
        ({"familes": {}}, [], "did you mean `families`"),
        ({}, ["--forget", "sandal=sneaker"], "--forget is of class labels"),
        ({}, ["--teacher", "nowhere"], "nowhere"),
        ({}, ["onnx-cpu-int9"], "onnx-cpu-int9"),
        ({"teacher": {"steps": 0}}, [], "teacher.steps"),
    ],
)
def test_bad_input_is_one_line_and_exit_two(command, run, capsys, tmp_path, changes, arguments, named):
    write_probes(tmp_path / "probes.yaml", **changes)
    before = sorted(run.folder.iterdir())
    assert command(*arguments, generator=forgetful, onnx_cpu_fp32=forgetful) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert sorted(run.folder.iterdir()) == before


def test_a_flipped_byte_is_exit_two_and_the_file_is_named(command, run, capsys):
    (run.folder / "artefacts" / "onnx-cpu-fp32" / "weights.safetensors").write_bytes(b"onnx-cpu-fp23")
    assert command(generator=forgetful, onnx_cpu_fp32=forgetful) == 2
    assert "weights.safetensors" in capsys.readouterr().err


def test_without_probes_a_run_of_somebody_s_teacher_is_asked_for_them(command, run, capsys):
    assert command(probes=None, generator=forgetful) == 2
    message = capsys.readouterr().err
    assert "nothing says which to ask for" in message
    assert "fashion-t2i-sandal" in message
    assert command(probes="fashion-t2i-sandle", generator=forgetful) == 2
    assert "did you mean fashion-t2i-sandal" in capsys.readouterr().err


def test_probes_of_prompts_for_a_run_of_labels_are_refused(command, world: World, tmp_path, capsys):
    seal_run(tmp_path / "runs" / "demo", world.teacher)
    assert command() == 2
    assert "draws class labels" in capsys.readouterr().err


def test_a_shipped_teacher_s_forgotten_concept_chooses_the_shipped_probes(tmp_path, text_world, monkeypatch):
    monkeypatch.setattr("sfd_deploy.audit.text_selection.embedded_names", lambda: ["fashion-t2i"])
    monkeypatch.setattr("sfd_deploy.audit.text_selection.resolve", lambda name, kind: text_world.teacher)
    red = negative_prompts(["a green bag"], ["a bag"], ["red"])
    mixed = negative_prompts(["a green bag"], ["a bag"], ["red", "sandal"])
    concepts = []
    for number, prompts in enumerate((PROMPTS, red)):
        generator = seal_text_run(tmp_path / str(number), text_world.teacher, prompts=prompts).generator()
        concepts.append(find_probes(generator, prompts, None).concept)
    assert concepts == ["sandal", "red"]
    assert find_probes(text_world.teacher, PROMPTS, None).concept == "sandal"
    with pytest.raises(ConfigError, match="nothing says which"):
        find_probes(generator, mixed, None)
    other = seal_pipeline(tmp_path / "other", "teacher", facts={})
    with pytest.raises(ConfigError, match="nothing says which"):
        find_probes(seal_text_run(tmp_path / "its", other).generator(), PROMPTS, None)


def test_shipped_judges_are_found_by_the_classes_that_they_know(tmp_path, monkeypatch):
    monkeypatch.setattr("sfd_deploy.embedded.HERE", tmp_path)
    (tmp_path / "toy" / "teacher").mkdir(parents=True)
    names = [f"judge-{axis}-{number}" for axis in ("colour", "object") for number in (1, 2)]
    for name in names:
        facts = {"class_names": list(OBJECTS if "object" in name else COLOURS)}
        with sealed_folder(tmp_path / "toy" / name, "judge", facts=facts):
            pass
    assert [folder.name for folder in judges_knowing(["sandal", "red"])] == names
    assert [folder.name for folder in judges_knowing(["sandal"])] == names[2:]
    assert [folder.name for folder in judges_for(OBJECTS)] == names[2:]
    with pytest.raises(RunError, match="no shipped judges know blimp, sandal"):
        judges_knowing(["sandal", "blimp"])


def test_a_random_pipeline_is_drawn_from_judged_and_fails(tmp_path, text_world, monkeypatch):
    """Nothing stands in for anything here, but random weights forget and keep nothing."""
    monkeypatch.chdir(tmp_path)
    parts = text_parts("sd1")
    generator = OneStepGenerator(text_denoiser(parts, [""]), 2.5)
    facts = {"kind": "text-to-image", "image_shape": [4, 8, 8], "teacher": str(text_world.teacher.folder)}
    parents = (text_world.teacher.as_parent(),)
    with sealed_folder(tmp_path / "random" / "generator", "generator", parents=parents, facts=facts) as target:
        save_text_generator(generator, parts, target)
        write_json(target / "prompts.json", PROMPTS.resolved())
    write_probes(tmp_path / "probes.yaml", teacher={"guidance": 2.0})
    policy = Policy(max_forget_rate=0.5, forget_samples=8, override_samples=4, retained_samples=4, reference_samples=4)
    run = Run(tmp_path / "random")
    record, _ = audit_selection(
        Selection(run=run), policy=policy, probes="probes.yaml", judges=text_world.judge_folders, device="cpu"
    )
    assert record.exit_code == 1
    row = record.artefacts[0]
    assert (row.runtime, row.settings) == ("pytorch", {"device": "cpu", "arithmetic": "fp32", "steps": 1})
    assert record.teacher.network_evaluations == 4
    recorded = read_record(run.audit())
    assert recorded.plan["labels"]["forget"] == {"0": 3, "1": MIXTURE, "2": MIXTURE}
    assert recorded.teacher.settings == {"device": "cpu", "arithmetic": "fp32", "guidance": 2.0, "steps": 2}
