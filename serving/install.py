"""Set up Triton without containers: a virtual environment around the server that a wheel carries.

The server's Python needs numpy 1, ours may have numpy 2, so it is an environment of its own. Built in
place (a virtual environment cannot be moved): a marker says from the first moment that the folder is
ours to clear, and from the last what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sfd_deploy.errors import BackendError, RunError
from sfd_deploy.progress import progress_bar
from sfd_deploy.runs import write_json

REQUIREMENTS = Path(__file__).with_name("triton-requirements.txt")
MARKER, PIP_LOG = "sfd-deploy-triton.json", "pip.log"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
STUB = "triton_python_backend_stub"
FOREIGN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}  # would let our own packages leak into the server's
MEND = "set it up with `sfd-deploy serve --install-triton DIR`"


@dataclass(frozen=True)
class Triton:
    """An installed server."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its Python packages lie."""
        return self.folder / "lib" / f"python{PYTHON}" / "site-packages"

    @property
    def home(self) -> Path:
        """Where the wheel put the server."""
        return self.packages / "pytriton" / "tritonserver"

    @property
    def server(self) -> Path:
        """The server's binary."""
        return self.home / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """Its folder of back ends: the python one alone."""
        return self.home / "backends"

    @property
    def stub(self) -> Path:
        """The program in which the python back end runs a model."""
        return self.backends / "python" / STUB

    def environment(self) -> dict[str, str]:
        """Variables the server and its stub run under.

        ``PATH`` decides which Python the stub embeds; the stub needs that Python's shared library.
        """
        kept = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
        return {
            **kept,
            "PATH": f"{self.python.parent.absolute()}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": os.pathsep.join(path for path in libraries if path),
            "PYTHONNOUSERSITE": "1",
            # The stub would write __pycache__ into the sealed repository.
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def triton_folder(given: Path | None = None) -> Path:
    """The environment's folder: as given, else ``SFD_DEPLOY_TRITON``, else ``.triton`` here."""
    return given or Path(os.environ.get("SFD_DEPLOY_TRITON") or ".triton")


def open_triton(folder: Path) -> Triton:
    """The finished environment in ``folder``.

    Raises:
        BackendError: there is none, or it was made for another Python or with other pins.
    """
    if not _recorded(folder):
        raise BackendError(f"{folder}: no Triton server", MEND)
    if not _is_current(folder):
        raise BackendError(f"{folder}: its Triton server was set up by another version of sfd-deploy or Python", MEND)
    return Triton(folder)


def install_triton(folder: Path) -> Triton:
    """Make the environment in ``folder``; a finished one is left alone, a half-finished one made again.

    Raises:
        RunError: the folder holds something else, or cannot be written.
        BackendError: pip or the Python installation failed; one line says how.
    """
    if _is_current(folder):
        return Triton(folder)
    triton = Triton(folder)
    try:
        _clear(folder)
        folder.mkdir(parents=True)
        write_json(folder / MARKER, {})
        with progress_bar("set up Triton", total=3) as advance:
            advance(0, "virtual environment")
            _make_environment(folder)
            advance(1, f"pip install -r {REQUIREMENTS.name}")
            _pip_install(triton)
            advance(1, "python back end")
            _place_stub(triton)
            advance(1, "")
        (folder / PIP_LOG).unlink(missing_ok=True)
        write_json(folder / MARKER, {**_wanted(), "packages": _packages(triton)})
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise RunError(f"{folder}: {reason}", "free space or choose a writable folder") from None
    return triton


def _wanted() -> dict[str, Any]:
    return {"python": sys.version.split()[0], "requirements": hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()}


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _is_current(folder: Path) -> bool:
    return _wanted().items() <= _recorded(folder).items() and Triton(folder).stub.is_file()


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
        raise RunError(f"{folder}: exists and is not one of ours", "choose another folder or remove it")
    shutil.rmtree(folder)


def _make_environment(folder: Path) -> None:
    _call([sys.executable, "-m", "venv", str(folder)], "a virtual environment cannot be made", os.environ)


def _pip_install(triton: Triton) -> None:
    command = [str(triton.python), "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "--no-input",
               "--log", str(triton.folder / PIP_LOG), "-r", str(REQUIREMENTS)]  # fmt: skip
    _call(command, "pip cannot install Triton's packages", triton.environment())


def _place_stub(triton: Triton) -> None:
    # The wheel ships the stub once per Python version, beside the folder where the server looks for it.
    source = triton.home / "python_backend_stubs" / PYTHON / STUB
    if not source.is_file():
        raise BackendError(f"Triton's python back end has no stub for Python {PYTHON}", "use Python 3.11 or 3.12")
    shutil.copy2(source, triton.stub)
    # Without its arguments the stub says so and ends; the loader's status 127 means a library is missing.
    found = subprocess.run([triton.stub], env=triton.environment(), capture_output=True, text=True, check=False)
    if found.returncode == 127:
        raise BackendError(
            f"Triton's python back end cannot start ({last_line(found.stderr)})",
            f"use a Python built with its shared library (on Debian and Ubuntu: apt-get install libpython{PYTHON})",
        )


def _packages(triton: Triton) -> dict[str, str]:
    found = metadata.distributions(path=[str(triton.packages)])
    return dict(sorted((item.metadata["Name"], item.version) for item in found))


def _call(command: Sequence[str], failure: str, environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = last_line(done.stderr) or last_line(done.stdout) or f"exit status {done.returncode}"
        raise BackendError(f"{failure} ({reason})", "see to that and run the same command again")


def last_line(text: str) -> str:
    """The last line that says something, without pip's ``ERROR:``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else ""
