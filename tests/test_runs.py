from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfd_deploy.errors import DigestError, ManifestError, RunError
from sfd_deploy.manifest import MANIFEST, verify
from sfd_deploy.runs import Run, require_room, sealed_folder, write_json
from tests.conftest import seal_tiny_run


# ruff: noqa: PT012 (the block is what fails)
def test_a_block_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), sealed_folder(tmp_path / "thing", "artefact") as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_by_the_next_and_a_living_ones_is_not(tmp_path: Path):
    write = (
        "import sys; from pathlib import Path; from sfd_deploy.runs import sealed_folder\n"
        "with sealed_folder(Path(sys.argv[1]), 'artefact') as folder:\n"
        "    (folder / 'half').write_text('half'); print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", write, str(tmp_path / "thing")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:  # type: ignore[call-overload]
        left, kept = (Path(writer.stdout.readline().strip()) for writer in (killed, living))
        killed.kill()
        killed.wait()
        assert (left / "half").exists()
        with sealed_folder(tmp_path / "thing", "artefact") as folder:
            assert {path.name for path in tmp_path.iterdir()} == {kept.name, folder.name}
        living.communicate("")
    assert living.returncode == 0
    assert (tmp_path / "thing" / "half").read_text() == "half"


def test_a_failed_replacement_keeps_the_earlier_folder(tmp_path: Path):
    for content in (b"one", b"two"):
        with sealed_folder(tmp_path / "thing", "artefact") as folder:
            (folder / "file").write_bytes(content)
    with pytest.raises(ZeroDivisionError), sealed_folder(tmp_path / "thing", "artefact"):
        raise ZeroDivisionError
    assert (tmp_path / "thing" / "file").read_bytes() == b"two"
    assert verify(tmp_path / "thing")


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not one of ours"), sealed_folder(tmp_path / "thing", "artefact"):
        pass
    assert (tmp_path / "thing" / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_another_kind_is_never_replaced(tmp_path: Path):
    with sealed_folder(tmp_path / "thing", "teacher"):
        pass
    with pytest.raises(RunError, match="holds a teacher, and a judge would replace it"):
        require_room(tmp_path / "thing", "judge")
    with pytest.raises(RunError, match="holds a teacher"), sealed_folder(tmp_path / "thing", "judge"):
        pytest.fail("worked for nothing")
    assert verify(tmp_path / "thing", "teacher")


def test_room_is_an_empty_folder_or_one_of_the_same_kind(tmp_path: Path):
    require_room(tmp_path / "none", "judge")
    (tmp_path / "empty").mkdir()
    require_room(tmp_path / "empty", "judge")
    with sealed_folder(tmp_path / "judge", "judge"):
        pass
    require_room(tmp_path / "judge", "judge")
    (tmp_path / "judge" / MANIFEST).write_text("{}")
    with pytest.raises(RunError, match="not one of ours"):
        require_room(tmp_path / "judge", "judge")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_disk_is_one_line_and_leaves_nothing(tmp_path: Path, code: int):
    with pytest.raises(RunError, match=os.strerror(code)), sealed_folder(tmp_path / "thing", "artefact") as folder:
        (folder / "half").write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), sealed_folder(tmp_path / "file" / "thing", "artefact"):
        pass
    with pytest.raises(RunError, match="is a file, and a folder is to be written"):
        require_room(tmp_path / "file", "artefact")


def test_a_place_where_no_folder_can_be_is_one_line():
    with pytest.raises(RunError, match=r"/proc/thing: cannot be written"), sealed_folder(Path("/proc/thing"), "judge"):
        pass


def test_other_os_errors_are_ours_to_see(tmp_path: Path):
    with pytest.raises(OSError, match="Input/output"), sealed_folder(tmp_path / "thing", "artefact"):
        raise OSError(errno.EIO, "Input/output error")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text().split() == ["{", '"x":', "1", "}"]


def test_the_latest_run_is_the_one_sealed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no finished run"):
        Run.latest()
    older, newer = seal_tiny_run(tmp_path / "runs" / "a"), seal_tiny_run(tmp_path / "runs" / "b", seed=1)
    os.utime(older.folder / "generator" / MANIFEST, (1, 1))
    assert Run.named(None).name == newer.name
    assert Run.named("a").generator().digest == older.generator().digest
    with pytest.raises(RunError, match="no such run"):
        Run.named("c")


def test_a_run_opens_only_verified_folders(tmp_path: Path):
    run = seal_tiny_run(tmp_path / "r")
    with pytest.raises(RunError, match="no such artefact"):
        run.artefact("onnx-cpu-int8")
    with pytest.raises(RunError, match="no audit"):
        run.audit()
    weights = run.folder / "generator" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestError, match=r"diffusion_pytorch_model\.safetensors"):
        run.generator()
    shutil.rmtree(run.folder / "generator")
    with pytest.raises(ManifestError, match="no manifest"):
        run.generator()
