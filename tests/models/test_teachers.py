from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sfd_deploy.config import preset_names, read_values
from sfd_deploy.embedded import embedded_names, resolve
from sfd_deploy.errors import LabelError, ManifestError, ModelError, RunError
from sfd_deploy.latents import Latents
from sfd_deploy.models.generator import labels_of, load_teacher
from sfd_deploy.models.teachers import open_teacher
from sfd_deploy.runs import Run
from sfd_deploy.runtime import open_runtime
from tests.models.hub import COMMIT, pretend_hub
from tests.models.tiny import foreign_folder, tiny_denoiser

NAMES = ("circle", "square", "star")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return foreign_folder(tmp_path / "model")


def class_names(folder: Path, **options: object) -> tuple[str, ...]:
    return labels_of(open_teacher(folder, **options)).class_names  # type: ignore[arg-type]


def test_a_shipped_name_and_a_sealed_folder_open_as_they_did():
    shipped = resolve("fashion-mnist", "teacher")
    for reference in ("fashion-mnist", shipped.folder, str(shipped.folder)):
        assert open_teacher(reference).digest == shipped.digest
    assert load_teacher(open_teacher("fashion-mnist")).sigma_data == 0.5


def test_a_foreign_folder_opens_as_a_teacher_with_labels_shape_sampler_and_parent(folder):
    sealed = open_teacher(folder, class_names=NAMES)
    assert labels_of(sealed).class_names == NAMES
    assert sealed.facts["image_shape"] == [1, 16, 16]
    parent = sealed.as_parent()
    assert (parent.kind, parent.name, parent.digest) == ("teacher", "model", sealed.digest)
    noisy, sigma, labels = torch.randn(2, 1, 16, 16), torch.tensor([0.5, 2.5]), torch.tensor([0, 2])
    assert torch.equal(load_teacher(sealed)(noisy, sigma, labels), tiny_denoiser("epsilon")(noisy, sigma, labels))


def test_a_foreign_teacher_draws_behind_the_runtime_seam(folder):
    runtime = open_runtime(open_teacher(folder))
    runtime.sampler = runtime.sampler.model_copy(update={"steps": 2})  # type: ignore[attr-defined]
    images = runtime.draw(Latents.of_stream("sample", 0, 0, 2), np.array([0, 1]))
    assert images.shape == (2, 1, 16, 16)
    assert np.abs(images).max() <= 1


def test_the_digest_is_of_the_files_that_are_read_and_of_nothing_else(folder, tmp_path):
    digest = open_teacher(folder).digest
    (folder / "README.md").write_text("words")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_teacher(moved, class_names=NAMES).digest == digest
    weights = next((folder / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_teacher(folder).digest != digest


def test_labels_are_numbers_or_the_pipelines_own_names(folder):
    assert class_names(folder) == ("0", "1", "2")
    index = {"_class_name": "DDPMPipeline", "id2label": {"1": "square", "0": "circle", "2": "star"}}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert class_names(folder) == NAMES
    assert class_names(folder, class_names=("a", "b", "c")) == ("a", "b", "c")


def test_the_null_label_behind_the_named_classes_is_dropped(tmp_path):
    guided = foreign_folder(tmp_path / "guided", classes=4)
    denoiser = load_teacher(open_teacher(guided, class_names=NAMES))
    whole = tiny_denoiser("epsilon", classes=4)
    assert denoiser.unet.config["num_class_embeds"] == 3
    assert torch.equal(denoiser.unet.class_embedding.weight, whole.unet.class_embedding.weight[:3])
    noisy, sigma = torch.randn(3, 1, 16, 16), torch.full((3,), 2.5)
    assert torch.equal(denoiser(noisy, sigma, torch.arange(3)), whole(noisy, sigma, torch.arange(3)))
    with pytest.raises(IndexError):
        denoiser(noisy[:1], sigma[:1], torch.tensor([3]))


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c", "d")])
def test_class_names_that_do_not_fit_the_labels_are_refused(folder, names):
    with pytest.raises(LabelError, match=f"knows 3 labels, {len(names)} classes are named"):
        open_teacher(folder, class_names=names)


def test_a_gap_in_id2label_is_refused(folder):
    (folder / "model_index.json").write_text(json.dumps({"id2label": {"0": "a", "2": "c"}}))
    with pytest.raises(LabelError, match="id2label has no label '1'"):
        open_teacher(folder)


def test_a_sealed_teachers_classes_cannot_be_renamed():
    with pytest.raises(LabelError, match="its manifest names the classes"):
        open_teacher("fashion-mnist", class_names=NAMES)


def test_a_one_step_generator_is_no_teacher(folder, tiny_run: Run):
    with pytest.raises(ManifestError, match="is a generator, not a teacher"):
        open_teacher(tiny_run.generator().folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ConsistencyModelPipeline"}))
    with pytest.raises(ModelError, match="not a teacher"):
        open_teacher(folder)


def test_a_teacher_whose_weights_are_not_finite_is_refused_when_loaded(tmp_path):
    denoiser = tiny_denoiser("epsilon")
    denoiser.unet.conv_in.weight[0, 0, 0, 0] = torch.inf
    denoiser.unet.save_pretrained(tmp_path / "unet")
    denoiser.scheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ModelError, match=r"non-finite network: conv_in\.weight"):
        load_teacher(open_teacher(tmp_path))


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A hub that has somebody/shapes; what it was asked for."""
    return pretend_hub(monkeypatch, folder, "somebody/shapes")


def test_a_hub_model_is_downloaded_without_pickles_and_remembers_its_commit(hub):
    sealed = open_teacher("somebody/shapes", class_names=NAMES, revision="main")
    assert (sealed.name, sealed.facts["reference"]) == ("somebody/shapes", f"somebody/shapes@{COMMIT}")
    assert (hub[0]["repository"], hub[0]["revision"]) == ("somebody/shapes", "main")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in hub[0]["patterns"])  # type: ignore[union-attr]
    assert open_teacher(sealed.facts["reference"]).digest == sealed.digest == open_teacher(sealed.folder).digest
    assert hub[1]["revision"] == COMMIT


def test_a_model_that_the_hub_does_not_give_is_one_line(hub):
    with pytest.raises(RunError, match="somebody/else: no such folder, and the model hub did not give it"):
        open_teacher("somebody/else")


@pytest.mark.parametrize("name", preset_names("train"))
def test_no_shipped_config_asks_a_hub_for_a_teacher_that_is_a_folder_of_the_users_own(name, hub, tmp_path, monkeypatch):
    """``teachers/cifar10`` is a hub's name too, of whoever owns ``teachers`` there."""
    monkeypatch.chdir(tmp_path)
    teacher = read_values(name, "train")[0]["teacher"]
    if teacher not in embedded_names():
        with pytest.raises(RunError, match=re.escape(f"{teacher}: no such teacher")):
            open_teacher(teacher)
    assert not hub


def test_a_mistyped_path_or_name_does_not_go_to_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "teachers").mkdir()
    monkeypatch.chdir(tmp_path)
    for reference in ("teachers/mine", "./missing", "a/b/c"):
        with pytest.raises(RunError, match="no such teacher"):
            open_teacher(reference)
    with pytest.raises(RunError, match="did you mean fashion-mnist"):
        open_teacher("fashion-mnits")
    assert not hub
