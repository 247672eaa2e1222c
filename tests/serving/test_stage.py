"""What may be served: one planted fault a test, each refused with its own sentence and exit code."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from sfd_deploy.errors import DigestError, ManifestError, RunError
from sfd_deploy.evidence import EvidenceError
from sfd_deploy.latents import Latents, standard_normal
from sfd_deploy.manifest import verify
from sfd_deploy.runs import sealed_folder
from sfd_deploy.runtime import NotRunnableHereError, open_runtime
from sfd_deploy.runtime.seam import to_uint8
from sfd_deploy.serving.repository import Probe
from sfd_deploy.serving.stage import build_repository
from tests.conftest import seal_tiny_run
from tests.export.text_runs import PROMPTS
from tests.serving.fixtures import MODEL, POLICY, SETTINGS, row_of, seal_artefact, seal_audit


def test_what_passed_is_served_by_both_back_ends_that_can_and_the_lineage_says_from_what(audited_run):
    artefact, audit = audited_run.artefact(MODEL), audited_run.audit()
    repository = build_repository(audited_run, POLICY)
    models = repository.facts["models"]
    assert [(row["name"], row["repository"]) for row in models] == [(MODEL, "python"), (MODEL, "onnxruntime")]
    for row in models:
        assert (row["artefact_digest"], row["audit_digest"]) == (artefact.digest, audit.digest)
    assert set(repository.manifest.parents) == {artefact.as_parent(), audit.as_parent()}
    assert repository.folder == audited_run.folder / "repository"
    graph = (artefact.folder / "model.onnx").read_bytes()
    for flavour in ("python", "onnxruntime"):
        assert (repository.folder / flavour / MODEL / "1" / "model.onnx").read_bytes() == graph
    assert not (repository.folder / "tensorrt").exists()


def test_the_probe_holds_one_image_per_label_as_onnx_runtime_draws_it(audited_run):
    repository = build_repository(audited_run, POLICY)
    probe = Probe.load(repository.folder / "python" / MODEL / "probe.npz")
    session = onnxruntime.InferenceSession(audited_run.artefact(MODEL).folder / "model.onnx")
    feeds = {"latents": standard_normal(probe.seeds, (1, 16, 16)), "class_labels": probe.labels}
    images = session.run(["images"], feeds)[0]
    assert probe.labels.tolist() == [0, 1, 2]
    assert np.abs(probe.images - (images + 1) * 127.5).max() <= 1


def test_a_failed_verdict_is_refused_and_the_reason_repeated(audited_run):
    row = row_of(audited_run.artefact(MODEL), verdict="fail", reasons=("forget rate 4 %",))
    seal_audit(audited_run, row)
    with pytest.raises(EvidenceError, match="forget rate 4 %") as caught:
        build_repository(audited_run, POLICY, [MODEL])
    assert caught.value.exit_code == 1


def test_with_nothing_that_passed_the_default_refuses_and_says_why_of_each(audited_run):
    seal_audit(audited_run, row_of(audited_run.artefact(MODEL), verdict="inconclusive"))
    with pytest.raises(EvidenceError, match=f"nothing to serve .*{MODEL}: verdict inconclusive") as caught:
        build_repository(audited_run, POLICY)
    assert caught.value.exit_code == 1
    assert not (audited_run.folder / "repository").exists()


def test_an_artefact_exported_again_after_its_audit_is_refused(audited_run, tiny_graph):
    seal_artefact(audited_run, tiny_graph + b"\x00")
    with pytest.raises(EvidenceError, match="audited with digest"):
        build_repository(audited_run, POLICY)


def test_another_policy_than_the_audits_is_refused(audited_run):
    with pytest.raises(EvidenceError, match="audited under policy 000000000000, asked for 111111111111"):
        build_repository(audited_run, "1" * 64)


@pytest.mark.parametrize(
    "settings",
    [
        {**SETTINGS, "provider": "CUDAExecutionProvider"},
        {**SETTINGS, "arithmetic": "fp16"},
        {"provider": "CPUExecutionProvider", "arithmetic": "fp32"},
        {**SETTINGS, "graph_optimisation": "off"},
    ],
)
def test_settings_that_the_served_model_would_not_run_with_are_refused(audited_run, settings):
    seal_audit(audited_run, row_of(audited_run.artefact(MODEL), settings=settings))
    with pytest.raises(EvidenceError, match="would be served in onnxruntime with"):
        build_repository(audited_run, POLICY)


def test_another_runtime_than_the_audits_is_refused(audited_run):
    seal_audit(audited_run, row_of(audited_run.artefact(MODEL), runtime="openvino"))
    with pytest.raises(EvidenceError, match="audited in openvino"):
        build_repository(audited_run, POLICY)


def test_an_artefact_that_was_never_audited_is_refused_by_name_and_left_out_by_default(audited_run, tiny_graph):
    seal_artefact(audited_run, tiny_graph, "onnx-cpu-int8")
    with pytest.raises(EvidenceError, match="onnx-cpu-int8: not in the audit record"):
        build_repository(audited_run, POLICY, ["onnx-cpu-int8"])
    repository = build_repository(audited_run, POLICY)
    assert repository.facts["left_out"] == {"onnx-cpu-int8": "not audited"}
    assert {row["name"] for row in repository.facts["models"]} == {MODEL}


def test_a_flipped_byte_in_the_artefact_is_exit_2_and_names_the_file(audited_run):
    graph = audited_run.folder / "artefacts" / MODEL / "model.onnx"
    flipped = bytearray(graph.read_bytes())
    flipped[100] ^= 1
    graph.write_bytes(flipped)
    with pytest.raises(DigestError, match=r"model\.onnx") as caught:
        build_repository(audited_run, POLICY)
    assert caught.value.exit_code == 2


def test_a_flipped_byte_in_the_audit_is_exit_2_and_names_the_file(audited_run):
    record = audited_run.folder / "audit" / "audit.json"
    record.write_text(record.read_text().replace('"pass"', '"pasS"'))
    with pytest.raises(DigestError, match=r"audit\.json") as caught:
        build_repository(audited_run, POLICY)
    assert caught.value.exit_code == 2


def test_a_run_without_an_audit_says_so(tmp_path, tiny_graph):
    run = seal_tiny_run(tmp_path / "run")
    seal_artefact(run, tiny_graph)
    with pytest.raises(RunError, match="no audit"):
        build_repository(run, POLICY)


def test_an_engine_of_tensorrt_for_rtx_is_never_served(audited_run, tiny_graph):
    engine = seal_artefact(audited_run, b"engine", "trt-rtx-fp16", runtime="trt-rtx")
    seal_audit(audited_run, row_of(audited_run.artefact(MODEL)), row_of(engine))
    with pytest.raises(EvidenceError, match="cannot load a trt-rtx engine"):
        build_repository(audited_run, POLICY, ["trt-rtx-fp16"])
    assert build_repository(audited_run, POLICY).facts["left_out"] == {
        "trt-rtx-fp16": "Triton cannot load a trt-rtx engine"
    }


def test_an_engine_that_this_machine_cannot_run_is_refused_since_its_settings_cannot_be_compared(audited_run):
    facts = {"runtime": "trt", "engine": {"version": "0.0", "compute_capabilities": ["SM00"]}}
    engine = seal_artefact(audited_run, b"engine", "trt-gpu-fp16", **facts)
    seal_audit(audited_run, row_of(engine))
    with pytest.raises(NotRunnableHereError):
        build_repository(audited_run, POLICY, ["trt-gpu-fp16"])


def test_a_graph_whose_shape_is_not_its_manifests_is_refused(audited_run, tiny_graph):
    seal_audit(audited_run, row_of(seal_artefact(audited_run, tiny_graph, image_shape=[1, 28, 28])))
    with pytest.raises(ManifestError, match=r"draws images of \(1, 16, 16\)"):
        build_repository(audited_run, POLICY)


def test_a_refusal_leaves_the_repository_before_it_whole(audited_run):
    before = build_repository(audited_run, POLICY)
    with pytest.raises(EvidenceError):
        build_repository(audited_run, "1" * 64)
    assert verify(before.folder).digest == before.digest
    assert [path.name for path in audited_run.folder.iterdir() if path.name.startswith(".")] == []


def test_serving_again_replaces_the_repository(audited_run):
    first = build_repository(audited_run, POLICY)
    (first.folder / "python" / MODEL / "1" / "stray").write_text("left by someone")
    build_repository(audited_run, POLICY)
    assert not (first.folder / "python" / MODEL / "1" / "stray").exists()


def test_prompts_are_served_by_the_python_back_end_alone(audited_text_run):
    repository = build_repository(audited_text_run, POLICY)
    assert [(row["name"], row["repository"]) for row in repository.facts["models"]] == [(MODEL, "python")]
    assert [path.name for path in repository.folder.iterdir() if path.is_dir()] == ["python"]
    assert audited_text_run.artefact(MODEL).as_parent() in repository.manifest.parents


def test_the_probe_of_a_text_model_asks_for_forget_and_retained_prompts(audited_text_run):
    repository = build_repository(audited_text_run, POLICY)
    probe = Probe.load(repository.folder / "python" / MODEL / "probe.npz")
    assert probe.texts == ("a red sandal", "the grey sandal", "a green bag", "a coat on a black background")
    numbers = np.array([PROMPTS.texts.index(text) for text in probe.texts])
    expected = open_runtime(audited_text_run.artefact(MODEL), "cpu").draw(Latents(probe.seeds), numbers)
    assert np.abs(probe.images.astype(int) - to_uint8(expected)).max() <= 1


def test_a_text_artefact_without_a_passing_row_is_refused(audited_text_run):
    seal_audit(audited_text_run, row_of(audited_text_run.artefact(MODEL), verdict="fail", reasons=("forget rate 4 %",)))
    with pytest.raises(EvidenceError, match="forget rate 4 %"):
        build_repository(audited_text_run, POLICY, [MODEL])
    seal_audit(audited_text_run, row_of(audited_text_run.artefact(MODEL), settings={**SETTINGS, "threads": 2}))
    assert build_repository(audited_text_run, POLICY).facts["models"][0]["name"] == MODEL  # served as audited
    seal_audit(audited_text_run, row_of(audited_text_run.artefact(MODEL), settings={**SETTINGS, "arithmetic": "int8"}))
    with pytest.raises(EvidenceError, match="would be served in onnxruntime with"):
        build_repository(audited_text_run, POLICY)


def test_engines_of_prompts_are_not_served(audited_text_run):
    artefact = audited_text_run.artefact(MODEL)
    engine = audited_text_run.folder / "artefacts" / "trt-gpu-fp16"
    with sealed_folder(engine, "artefact", facts={**artefact.facts, "runtime": "trt"}) as folder:
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "model.plan").write_bytes(b"engine")
    reason = "prompts are served by the python back end, from ONNX graphs"
    assert build_repository(audited_text_run, POLICY).facts["left_out"] == {"trt-gpu-fp16": reason}
    with pytest.raises(EvidenceError, match=f"trt-gpu-fp16: {reason}"):
        build_repository(audited_text_run, POLICY, ["trt-gpu-fp16"])
