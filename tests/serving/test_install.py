"""Setting Triton up: what is left alone, what is made again, and how each failure reads.

The real environment is set up by the fixture ``triton``; here pip's part is played by a few files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfd_deploy.errors import BackendError, RunError
from sfd_deploy.serving import install
from sfd_deploy.serving.install import MARKER, PYTHON, Triton, install_triton, last_line, open_triton, triton_folder


def place_wheel(triton: Triton, stub: str = "#!/bin/sh\nexit 1\n", version: str = PYTHON) -> None:
    """The files of the wheel that set-up touches, and one package's record."""
    record = triton.packages / "somebody-1.2.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.2\n")
    path = triton.home / "python_backend_stubs" / version / "triton_python_backend_stub"
    path.parent.mkdir(parents=True)
    (triton.backends / "python").mkdir(parents=True)
    path.write_text(stub)
    path.chmod(0o755)


@pytest.fixture
def no_venv(monkeypatch):
    """Set-up without the seconds that a virtual environment takes."""
    monkeypatch.setattr(install, "_make_environment", lambda folder: None)


@pytest.fixture
def pip(monkeypatch, no_venv):
    """A pip that lays the wheel's files out at once; counts its calls."""
    calls: list[Path] = []

    def lay_out(triton: Triton) -> None:
        calls.append(triton.folder)
        place_wheel(triton)

    monkeypatch.setattr(install, "_pip_install", lay_out)
    return calls


def test_a_finished_environment_is_recorded_and_left_alone(tmp_path, pip):
    triton = install_triton(tmp_path / "triton")
    record = json.loads((triton.folder / MARKER).read_text())
    assert record["python"] == sys.version.split()[0]
    assert record["packages"] == {"somebody": "1.2"}
    assert triton.stub.stat().st_mode & 0o111
    assert install_triton(tmp_path / "triton") == open_triton(tmp_path / "triton") == triton
    assert len(pip) == 1


def test_a_half_finished_environment_is_made_again(tmp_path, pip):
    triton = install_triton(tmp_path / "triton")
    (triton.folder / MARKER).write_text("{}")  # as it reads until the end
    (triton.folder / "half").touch()
    with pytest.raises(BackendError, match="no Triton server"):
        open_triton(triton.folder)
    install_triton(triton.folder)
    assert not (triton.folder / "half").exists()
    assert len(pip) == 2


@pytest.mark.parametrize("key", ["python", "requirements"])
def test_an_environment_of_another_python_or_other_pins_is_made_again(tmp_path, pip, key):
    triton = install_triton(tmp_path / "triton")
    record = json.loads((triton.folder / MARKER).read_text())
    (triton.folder / MARKER).write_text(json.dumps({**record, key: "another"}))
    with pytest.raises(BackendError, match="another version"):
        open_triton(triton.folder)
    install_triton(triton.folder)
    assert len(pip) == 2


def test_a_killed_set_up_never_looks_finished(tmp_path, monkeypatch, no_venv):
    def killed(triton: Triton) -> None:
        place_wheel(triton)
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "_pip_install", killed)
    with pytest.raises(KeyboardInterrupt):
        install_triton(tmp_path / "triton")
    with pytest.raises(BackendError, match="no Triton server"):
        open_triton(tmp_path / "triton")


def test_somebody_elses_folder_is_never_cleared(tmp_path, pip):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    with pytest.raises(RunError, match="is not one of ours"):
        install_triton(tmp_path / "venv")
    assert (tmp_path / "venv" / "pyvenv.cfg").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is not one of ours"):
        install_triton(tmp_path / "file")


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        install_triton(tmp_path / "file" / "triton")


def test_a_package_that_pip_cannot_find_is_one_line_with_pips_reason(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("nvidia-pytriton==0.7.0\n")
    monkeypatch.setattr(install, "REQUIREMENTS", requirements)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=r"pip cannot install .*No matching distribution found for nvidia-pytriton"):
        install_triton(tmp_path / "triton")
    with pytest.raises(BackendError, match="no Triton server"):
        open_triton(tmp_path / "triton")


def test_a_missing_python_library_is_named_with_its_package(tmp_path, monkeypatch, no_venv):
    says = "#!/bin/sh\necho 'stub: error while loading shared libraries: libpython3.so: no such file' >&2\nexit 127\n"
    monkeypatch.setattr(install, "_pip_install", lambda triton: place_wheel(triton, says))
    with pytest.raises(BackendError, match=f"libpython3.so: no such file.*apt-get install libpython{PYTHON}"):
        install_triton(tmp_path / "triton")


def test_a_python_that_the_wheel_has_no_stub_for_is_named(tmp_path, monkeypatch, no_venv):
    monkeypatch.setattr(install, "_pip_install", lambda triton: place_wheel(triton, version="3.8"))
    with pytest.raises(BackendError, match=f"no stub for Python {PYTHON}"):
        install_triton(tmp_path / "triton")


def test_the_folder_is_the_option_then_the_variable_then_a_default(monkeypatch):
    monkeypatch.setenv("SFD_DEPLOY_TRITON", "/opt/triton")
    assert triton_folder(Path("mine")) == Path("mine")
    assert triton_folder() == Path("/opt/triton")
    monkeypatch.setenv("SFD_DEPLOY_TRITON", "")
    assert triton_folder() == Path(".triton")


def test_our_own_packages_cannot_leak_into_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/with/numpy-2")
    environment = Triton(tmp_path).environment()
    assert "PYTHONPATH" not in environment
    assert environment["PATH"].split(":")[0] == str(tmp_path / "bin")


def test_pips_last_words_are_found():
    assert last_line("a\nERROR: no such thing\n\n") == "no such thing"
    assert last_line("\n") == ""


@pytest.mark.triton
def test_the_pinned_environment_has_numpy_1_and_nothing_that_was_not_pinned(triton):
    packages = json.loads((triton.folder / MARKER).read_text())["packages"]
    pinned = dict(
        line.split("==") for line in install.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")
    )
    assert pinned["numpy"].startswith("1.")
    assert packages.items() >= pinned.items()
    assert packages.keys() - pinned.keys() <= {"pip", "setuptools"}
