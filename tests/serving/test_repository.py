"""Model folders: every configuration is read back with Triton's own message, not with our writer."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from sfd_deploy import latents
from sfd_deploy.errors import BackendError, DigestError, ManifestError
from sfd_deploy.runs import Run
from sfd_deploy.serving.config import ServingConfig
from sfd_deploy.serving.repository import Entry, Flavour, Probe, to_text, write_model
from tests.conftest import seal_tiny_run
from tests.serving.fixtures import MODEL, SETTINGS, seal_artefact


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return seal_tiny_run(tmp_path / "run")


def entry_of(run: Run, **facts: Any) -> Entry:
    probe = Probe(np.arange(3), np.arange(3) + 2**40, np.full((3, 1, 16, 16), 9, np.uint8))
    return Entry(seal_artefact(run, b"a graph", **facts), SETTINGS, {"audit_digest": "ab" * 32}, probe)


def written(tmp_path: Path, flavour: Flavour, entry: Entry, **config: int) -> pb.ModelConfig:
    write_model(tmp_path / "repository", flavour, entry, ServingConfig(**config))
    text = (tmp_path / "repository" / entry.name / "config.pbtxt").read_text()
    return text_format.Parse(text, pb.ModelConfig())


def tensors(listed: Any) -> list[tuple[str, int, list[int]]]:
    return [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in listed]


def test_a_client_of_the_python_back_end_sends_a_label_and_a_seed_and_gets_bytes(tmp_path, run):
    config = written(tmp_path, "python", entry_of(run))
    assert (config.backend, config.name) == ("python", MODEL)
    assert tensors(config.input) == [("class_labels", pb.TYPE_INT64, [1]), ("seed", pb.TYPE_INT64, [1])]
    assert tensors(config.output) == [("images", pb.TYPE_UINT8, [1, 16, 16])]


@pytest.mark.parametrize(("flavour", "file"), [("onnxruntime", "model.onnx"), ("tensorrt", "model.plan")])
def test_the_bare_back_ends_expose_latents_and_reshape_labels_to_the_graphs_own_rank(tmp_path, run, flavour, file):
    config = written(tmp_path, flavour, entry_of(run, runtime="trt" if flavour == "tensorrt" else "onnxruntime"))
    assert config.backend == flavour
    assert tensors(config.input) == [("latents", pb.TYPE_FP32, [1, 16, 16]), ("class_labels", pb.TYPE_INT64, [1])]
    assert config.input[1].HasField("reshape")
    assert list(config.input[1].reshape.shape) == []
    assert tensors(config.output) == [("images", pb.TYPE_FP32, [1, 16, 16])]
    assert (tmp_path / "repository" / MODEL / "1" / file).read_bytes() == b"a graph"


def test_batches_stay_inside_what_the_artefact_was_exported_for(tmp_path, run):
    entry = entry_of(run, batch={"min": 1, "opt": 8, "max": 24})
    config = written(tmp_path, "python", entry, queue_delay_us=250)
    assert config.max_batch_size == 24
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250


@pytest.mark.parametrize("batch", [{"min": 4, "opt": 8, "max": 16}, {"min": 1, "opt": 32, "max": 16}])
def test_a_batch_range_that_a_lone_request_would_leave_is_refused(tmp_path, run, batch):
    with pytest.raises(ManifestError, match="batches of"):
        written(tmp_path, "python", entry_of(run, batch=batch))


@pytest.mark.parametrize(
    ("flavour", "kind"), [("python", "KIND_CPU"), ("onnxruntime", "KIND_CPU"), ("tensorrt", "KIND_GPU")]
)
def test_nothing_is_switched_on_that_was_off_in_the_audit(tmp_path, run, flavour, kind):
    entry = entry_of(run, runtime="trt" if flavour == "tensorrt" else "onnxruntime")
    config = written(tmp_path, flavour, entry, instances=2)
    assert not config.HasField("optimization")
    assert [(group.count, pb.ModelInstanceGroup.Kind.Name(group.kind)) for group in config.instance_group] == [
        (2, kind)
    ]


def test_onnxruntime_is_told_the_thread_count_of_the_audit(tmp_path, run):
    config = written(tmp_path, "onnxruntime", entry_of(run))
    assert config.parameters["intra_op_thread_count"].string_value == "1"


def test_the_evidence_is_in_the_configuration_that_every_client_can_read(tmp_path, run):
    config = written(tmp_path, "python", entry_of(run))
    assert config.parameters["sfd_deploy.audit_digest"].string_value == "ab" * 32


def test_a_batch_size_of_zero_is_written_out_because_text_drops_it():
    message = pb.ModelConfig(name="m")
    assert "max_batch_size" not in text_format.MessageToString(message)
    assert "max_batch_size: 0\n" in to_text(message)
    assert text_format.Parse(to_text(message), pb.ModelConfig()) == message


def test_the_python_model_folder_holds_the_digest_of_each_file_it_will_load(tmp_path, run):
    entry = entry_of(run)
    written(tmp_path, "python", entry)
    version = tmp_path / "repository" / MODEL / "1"
    facts = json.loads((version / "serving.json").read_text())
    assert facts["files"] == {
        name: hashlib.sha256((version / name).read_bytes()).hexdigest()
        for name in ("drawing.py", "latents.py", "model.onnx", "model.py")
    }
    assert (version / "latents.py").read_bytes() == Path(latents.__file__).read_bytes()
    assert (facts["labels"], facts["image_shape"], facts["settings"]) == (3, [1, 16, 16], SETTINGS)


def test_bytes_that_change_between_the_check_and_the_copy_are_refused(tmp_path, run):
    entry = entry_of(run)
    (entry.artefact.folder / "model.onnx").write_bytes(b"b graph")
    with pytest.raises(DigestError, match=r"model\.onnx"):
        written(tmp_path, "python", entry)


def test_a_probe_is_read_as_it_was_written(tmp_path, run):
    entry = entry_of(run)
    written(tmp_path, "python", entry)
    found = Probe.load(tmp_path / "repository" / MODEL / "probe.npz")
    for name in ("labels", "seeds", "images"):
        assert np.array_equal(getattr(found, name), getattr(entry.probe, name))
    assert found.texts is None


def test_the_message_library_is_missed_in_one_line(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(BackendError, match="tritonclient is not installed"):
        written(tmp_path, "python", entry_of(run))


def text_entry(run: Run) -> Entry:
    artefact = run.artefact(MODEL)
    texts = ("a green bag", "the 'red' coat")
    probe = Probe(np.arange(2), np.arange(2), np.zeros((2, 3, 16, 16), np.uint8), texts)
    return Entry(artefact, SETTINGS, {"audit_digest": "ab" * 32}, probe)


def test_a_client_of_a_text_model_sends_a_prompt_and_a_seed_and_gets_bytes(tmp_path, audited_text_run):
    config = written(tmp_path, "python", text_entry(audited_text_run), queue_delay_us=250)
    assert config.backend == "python"
    assert tensors(config.input) == [("prompt", pb.TYPE_STRING, [1]), ("seed", pb.TYPE_INT64, [1])]
    assert tensors(config.output) == [("images", pb.TYPE_UINT8, [3, 16, 16])]
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [1])
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    assert config.parameters["sfd_deploy.audit_digest"].string_value == "ab" * 32


def test_a_text_model_holds_its_graphs_and_the_digest_of_each_file_it_will_load(tmp_path, audited_text_run):
    entry = text_entry(audited_text_run)
    written(tmp_path, "python", entry)
    version = tmp_path / "repository" / MODEL / "1"
    facts = json.loads((version / "serving.json").read_text())
    graphs = [f"{part}/model.onnx" for part in ("text_encoder", "unet", "vae_decoder")]
    assert facts["files"] == {
        name: hashlib.sha256((version / name).read_bytes()).hexdigest()
        for name in ("drawing.py", "latents.py", "model.py", *graphs, "tokenizer.json")
    }
    for graph in graphs:
        assert (version / graph).read_bytes() == (entry.artefact.folder / graph).read_bytes()
    assert (facts["latent_shape"], facts["image_shape"], facts["settings"]) == ([4, 8, 8], [3, 16, 16], SETTINGS)
    assert Probe.load(tmp_path / "repository" / MODEL / "probe.npz").texts == ("a green bag", "the 'red' coat")
