from __future__ import annotations

import ast
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from sfd_deploy.errors import ConfigError, ModelError
from sfd_deploy.measure.foreign.adopt import foreign_config
from sfd_deploy.measure.foreign.torchscript import FILE_OPERATORS, _suspicious, require_plain_program
from sfd_deploy.training.data import LabelledImages
from tests.measure import scripts
from tests.measure.foreign_world import LITTLE, adopt, adopted, config, pixel_images, save_torchscript

TRUSTED = config("torchscript") | LITTLE | {"trusted": True}


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    return pixel_images()


def load_without_looking(archive: Path) -> nn.Module:
    """What a reader who trusts everybody does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(archive))


def test_a_program_that_writes_files_does_so_when_loaded_and_is_refused_before(data, tmp_path):
    written = tmp_path / "written"
    archive = save_torchscript(scripts.WritesWhenLoaded(str(written)), tmp_path / "net.pt")
    written.unlink(missing_ok=True)
    with pytest.raises(ModelError, match="its program names save"):
        adopt(TRUSTED, archive, data, tmp_path / "judge")
    assert not written.exists()
    assert not (tmp_path / "judge").exists()
    load_without_looking(archive)  # the danger is real
    assert written.exists()


def test_a_program_that_writes_files_when_asked_is_refused(data, tmp_path):
    written = tmp_path / "written"
    archive = save_torchscript(scripts.WritesWhenAsked(str(written)), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="its program names save"):
        adopt(TRUSTED, archive, data, tmp_path / "judge")
    load_without_looking(archive)(torch.zeros(1, 1, 2, 2))
    assert written.exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [(scripts.ReadsAFile(), "names from_file"), (scripts.SpeaksElsewhere(), "names operators beyond PyTorch's")],
)
def test_programs_that_read_files_or_reach_beyond_tensors_are_refused(tmp_path, module, message):
    archive = save_torchscript(module, tmp_path / "net.pt")
    with pytest.raises(ModelError, match=message):
        require_plain_program(archive)


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.save(a, 'f')", "f = torch\nf.save(a, 'f')", 'getattr(torch, "save")(a, "f")',
        'getattr(torch, "sa\\x76e")(a, "f")', "ops.aten.save(a, 'f')", "o = ops\no.c10d.send(a)",
        "ops.c10d.send(a)", "torch.from_file('f')",
    ],
)  # fmt: skip
def test_another_name_for_a_file_operator_is_found_too(line):
    assert list(_suspicious(ast.parse(line)))


def test_the_names_of_harmless_programs_are_not_suspicious():
    lines = "x = torch.conv2d(a, b)\nops.prim.NumToTensor(torch.size(x, 0))\nops.quantized.linear(x)\ny = self.saved\n"
    assert list(_suspicious(ast.parse(lines))) == []


def test_every_operator_of_pytorch_that_takes_a_files_name_is_refused():
    named = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and any(item.name in {"filename", "file", "path"} and
           str(item.type) == "str" for item in schema.arguments)
    }  # fmt: skip
    assert named == FILE_OPERATORS


def test_trust_must_be_said():
    for values in (TRUSTED | {"trusted": False}, {key: TRUSTED[key] for key in TRUSTED if key != "trusted"}):
        with pytest.raises(ConfigError, match="a TorchScript file is a program"):
            foreign_config(values, "mine.yaml")


def test_outputs_go_by_key_in_a_dictionary(data, tmp_path):
    archive = save_torchscript(scripts.Corners(), tmp_path / "net.pt")
    judge = adopted(TRUSTED | {"output": "logits", "features_output": "pooled"}, archive, data, tmp_path / "judge")
    assert judge.accuracy == 1.0
    assert judge.reference.mean.shape == (4, 1)
    with pytest.raises(ModelError, match=r"2 outputs; say .*: logits, pooled"):
        adopt(TRUSTED, archive, data, tmp_path / "other")


def test_a_frozen_module_is_adopted_too(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Identity())).eval()).save(tmp_path / "net.pt")
    assert adopted(TRUSTED, tmp_path / "net.pt", data, tmp_path / "judge").accuracy == 1.0


def zipped(folder: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(folder / "net.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"net/{name.replace('_', '.', 1)}", content)
    return folder / "net.pt"


def test_files_that_are_no_torchscript_are_one_line(data, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"weight": torch.zeros(2)}, checkpoint)  # a zip too, but a pickle of tensors
    text = tmp_path / "text.pt"
    text.write_text("no")
    for source in (checkpoint, text, tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ModelError, match="not a TorchScript archive"):
            adopt(TRUSTED, source, data, tmp_path / "judge")
    damaged = zipped(tmp_path, constants_pkl=b"", data_pkl=b"")
    with pytest.raises(ModelError, match="it cannot be loaded"):
        adopt(TRUSTED, damaged, data, tmp_path / "judge")
    unreadable = zipped(tmp_path, constants_pkl=b"", code_py=b"class (")
    with pytest.raises(ModelError, match=r"its net/code\.py cannot be read"):
        adopt(TRUSTED, unreadable, data, tmp_path / "judge")


def test_a_program_that_fails_or_gives_no_tensor_is_one_line(data, tmp_path):
    wrong = save_torchscript(nn.Conv2d(3, 4, 2), tmp_path / "conv.pt", torch.zeros(1, 3, 2, 2))
    with pytest.raises(ModelError, match=r"conv\.pt: it does not run \(RuntimeError: .*expected input"):
        adopt(TRUSTED, wrong, data, tmp_path / "judge")
    words = save_torchscript(scripts.Words(), tmp_path / "words.pt")
    with pytest.raises(ModelError, match="it gives a str, not tensors"):
        adopt(TRUSTED, words, data, tmp_path / "judge")
