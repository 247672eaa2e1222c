"""``sfd-deploy judge --adopt``, and audits with judges that it made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sfd_deploy.audit.stage import audit_run
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.embedded import judges_for, resolve
from sfd_deploy.manifest import verify
from sfd_deploy.measure.judges import Judge, open_judge
from sfd_deploy.training.data import load_images
from tests.audit.toy import NAMES, POLICY, Opener, forgetful, leaking, seal_judge, seal_run, seal_teacher, verdicts
from tests.measure.foreign_world import (
    Exported,
    class_folders,
    config,
    little_graph,
    save_onnx,
    save_torchscript,
    write_yaml,
)

SCRIPT = {"trusted": True, "output": 0, "features_output": 1}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Judge]:
    folder = tmp_path_factory.mktemp("toy")
    return [seal_judge(folder / "plain", "plain", 1), seal_judge(folder / "residual", "residual", 2)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures") / "gratings", per_class=40)


@pytest.fixture(scope="module")
def graph(originals: list[Judge], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onnx(originals[0], tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def adopted(
    originals: list[Judge], graph: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The first judge as ONNX, the second as TorchScript, adopted on the command line."""
    folder = tmp_path_factory.mktemp("adopted")
    script = save_torchscript(Exported(originals[1].classifier), folder / "net.pt", torch.zeros(2, 1, 12, 12))
    values = {"onnx": config("onnx"), "torchscript": config("torchscript", **SCRIPT)}
    for (kind, keys), source in zip(values.items(), (graph, script), strict=True):
        assert adopt(write_yaml(folder / f"{kind}.yaml", keys), source, pictures, folder / kind) == 0
    return [folder / kind for kind in values]


def adopt(config: str, source: Path, data: Path, output: Path, *more: str) -> int:
    return exit_code_of(["judge", "--config", config, "--adopt", str(source), "--data", str(data), "-o", str(output),
                         "--threads", "1", *more])  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], message: str) -> bool:
    error = capsys.readouterr().err
    return message in error and "Traceback" not in error


def test_every_picture_of_class_folders_is_looked_at_and_the_card_is_printed(graph, pictures, tmp_path, capsys):
    yaml = write_yaml(tmp_path / "judge.yaml", config("onnx"))
    assert adopt(yaml, graph, pictures, tmp_path / "judge", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["format"], printed["held_out_images"], printed["data"]) == ("onnx", 40 * len(NAMES), "gratings")
    assert printed["digest"] == verify(tmp_path / "judge", "judge").digest
    assert np.array(printed["confusion"]).sum() == 40 * len(NAMES)
    assert printed["accuracy"] == np.trace(printed["confusion"]) / (40 * len(NAMES)) > 0.9
    assert not (tmp_path / "judge.work").exists()


def test_of_data_with_splits_only_the_test_split_is_looked_at(graph, tmp_path, capsys):
    class_folders(tmp_path / "data" / "train", per_class=9, seed=1)
    class_folders(tmp_path / "data" / "test", per_class=3, seed=2)
    yaml = write_yaml(tmp_path / "judge.yaml", config("onnx"))
    assert adopt(yaml, graph, tmp_path / "data", tmp_path / "judge", "--json") == 0
    assert json.loads(capsys.readouterr().out)["held_out_images"] == 3 * len(NAMES)


def test_adopted_judges_audit_as_their_originals_do(originals, adopted, tmp_path):
    teacher = seal_teacher(tmp_path / "painter")
    found = {}
    for name, judges in (("trained", originals), ("adopted", [open_judge(folder) for folder in adopted])):
        run = seal_run(tmp_path / name, teacher, ["onnx-cpu-fp32", "onnx-cpu-int8"])
        opener = Opener(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_cpu_int8=leaking(0.05))
        record, _ = audit_run(run, policy=POLICY, judges=judges, teacher=teacher, open=opener)
        assert [card["digest"] for card in record.judges] == [judge.digest for judge in judges]
        found[name] = record
    assert verdicts(found["adopted"]) == {"generator": "pass", "onnx-cpu-fp32": "pass", "onnx-cpu-int8": "fail"}
    assert verdicts(found["adopted"]) == verdicts(found["trained"])
    rows = [found[name].row("onnx-cpu-int8").figures.forget for name in ("trained", "adopted")]
    assert rows[0] == rows[1]


def test_one_model_changed_after_sealing_stops_an_audit(adopted, tmp_path, capsys):
    copy = adopted[0] / "model" / "net.onnx"
    content = copy.read_bytes()
    try:
        copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        arguments = ["--judge", str(adopted[0]), "--judge", str(adopted[1])]
        teacher = seal_teacher(tmp_path / "painter")
        run = seal_run(tmp_path / "run", teacher, ["onnx-cpu-fp32"])
        assert exit_code_of(["audit", str(run.folder), *arguments]) == 2
        assert refused(capsys, "net.onnx: sha256 is")
    finally:
        copy.write_bytes(content)


def test_without_labelled_images_the_line_says_why(tmp_path, capsys):
    graph = little_graph(tmp_path / "little.onnx")
    yaml = write_yaml(tmp_path / "judge.yaml", config("onnx"))
    code = exit_code_of(["judge", "--config", yaml, "--adopt", str(graph), "-o", str(tmp_path / "judge")])
    assert code == 2
    assert refused(capsys, "an audit needs each judge's own error")
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"kind": "keras"}, 2, "an adopted judge's is one of onnx, torchscript, clip, nudenet"),
        ({"pixel": {}}, 2, "did you mean `pixels`"),
        ({"output": "logits"}, 2, "net.onnx: no output logits"),
        ({"classes": ["flat", "rising", "upright", "sideways"]}, 2, "images of falling"),
        ({"pixels": {"channels": "grey", "mean": [9.0]}, "min_accuracy": 0.9}, 1, "judge accuracy is"),
    ],
)
def test_what_cannot_be_adopted_is_one_line_and_no_folder(graph, pictures, tmp_path, capsys, changes, code, message):
    yaml = write_yaml(tmp_path / "judge.yaml", config("onnx") | changes)
    assert adopt(yaml, graph, pictures, tmp_path / "judge") == code
    assert refused(capsys, message)
    assert not (tmp_path / "judge").exists()


def test_a_training_config_does_not_adopt_and_an_adopting_one_does_not_train(pictures, tmp_path, capsys):
    assert adopt("fashion-mnist-plain", tmp_path / "net.onnx", pictures, tmp_path / "judge") == 2
    assert refused(capsys, "`kind` is None")
    yaml = write_yaml(tmp_path / "judge.yaml", config("onnx"))
    assert exit_code_of(["judge", "--config", yaml, "--data", str(pictures), "-o", str(tmp_path / "judge")]) == 2
    assert refused(capsys, "unknown key `kind`")


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_the_shipped_judge_re_exported_is_adopted_with_its_own_labels(kind, fashion_data, tmp_path, capsys):
    names = tuple(resolve("fashion-mnist", "teacher").facts["labels"]["class_names"])
    shipped = open_judge(judges_for(names)[0])
    module, example = Exported(shipped.classifier.to(memory_format=torch.contiguous_format)), torch.zeros(2, 1, 28, 28)
    keys = config(kind, classes=list(names), **(SCRIPT if kind == "torchscript" else {}))
    if kind == "onnx":
        source = save_onnx(shipped, tmp_path / "net.onnx", size=28)
    else:
        source = save_torchscript(module, tmp_path / "net.pt", example)
    assert adopt(write_yaml(tmp_path / "judge.yaml", keys), source, fashion_data, tmp_path / "judge") == 0
    judge = open_judge(tmp_path / "judge")
    truth = load_images(fashion_data, "test", names).labels
    assert np.array_equal(judge.held_out[0], truth)
    assert np.array_equal(judge.held_out[1], shipped.held_out[1])
    assert judge.accuracy == shipped.accuracy
    assert judge.reference.mean == pytest.approx(shipped.reference.mean, abs=1e-3)
