from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfd_deploy.errors import DigestError, ManifestError
from sfd_deploy.manifest import MANIFEST, Parent, canonical_json, digest_of, instructions_in, verify
from sfd_deploy.runs import sealed_folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with sealed_folder(tmp_path / "thing", "artefact", facts={"a": 1}, seed=3) as folder:
        (folder / "model.onnx").write_bytes(b"weights")
        (folder / "sub").mkdir()
        (folder / "sub" / "notes.json").write_text("{}")
    return tmp_path / "thing"


def test_the_machine_s_instruction_sets_are_named_as_linux_does():
    flags = "model name\t: Some CPU: fast\nflags\t\t: fpu avx avx2 amx_bf16 avx512_vnni\nflags\t\t: avx512f\n"
    assert instructions_in(flags) == "avx2 avx512_vnni amx_bf16"
    assert instructions_in("flags\t\t: avx avx20\n") == instructions_in("") == ""


def test_a_sealed_folder_records_sha256_and_size_of_every_file(sealed: Path):
    found = verify(sealed, "artefact")
    assert set(found.manifest.files) == {"model.onnx", "sub/notes.json"}
    assert found.manifest.files["model.onnx"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert found.manifest.files["model.onnx"].bytes == 7
    assert found.digest == hashlib.sha256((sealed / MANIFEST).read_bytes()).hexdigest()
    assert found.manifest.versions["torch"]
    assert found.manifest.host["cores"] >= 1
    assert "instructions" in found.manifest.host
    assert found.as_parent() == Parent(kind="artefact", name="thing", digest=found.digest)


@given(position=st.integers(0, 6), flip=st.integers(1, 255))
def test_any_flipped_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, position: int, flip: int):
    target = tmp_path_factory.mktemp("flip") / "thing"
    with sealed_folder(target, "artefact") as folder:
        (folder / "model.onnx").write_bytes(b"weights")
    data = bytearray(b"weights")
    data[position] ^= flip
    (target / "model.onnx").write_bytes(data)
    with pytest.raises(DigestError, match=r"model\.onnx"):
        verify(target)


def test_a_missing_and_an_added_file_are_refused_by_name(sealed: Path):
    (sealed / "extra.bin").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"extra\.bin: not listed"):
        verify(sealed)
    (sealed / "extra.bin").unlink()
    (sealed / "sub" / "notes.json").unlink()
    with pytest.raises(ManifestError, match=r"notes\.json: missing"):
        verify(sealed)


def test_another_kind_no_manifest_and_a_damaged_one_are_refused(sealed: Path, tmp_path: Path):
    with pytest.raises(ManifestError, match="is a artefact, not a judge"):
        verify(sealed, "judge")
    with pytest.raises(ManifestError, match="no manifest"):
        verify(tmp_path)
    (sealed / MANIFEST).write_text('{"schema_version": 1')
    with pytest.raises(ManifestError, match="damaged"):
        verify(sealed)


def test_changing_a_fact_changes_the_digest(sealed: Path):
    before = verify(sealed).digest
    content = json.loads((sealed / MANIFEST).read_text())
    content["facts"]["a"] = 2
    (sealed / MANIFEST).write_text(json.dumps(content))
    assert verify(sealed).digest != before


def test_digests_do_not_depend_on_key_order_and_refuse_nan():
    assert digest_of({"b": 1, "a": [2]}) == digest_of({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
