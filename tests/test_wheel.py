"""The wheel, away from the repository: everything it needs at run time is inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import sfd_deploy, sfd_deploy.training.losses, sfd_deploy.export.stage, sfd_deploy.serving.install as install
from sfd_deploy.audit.report import _template
from sfd_deploy.embedded import judges_for, resolve
from sfd_deploy.policy.plan import Policy
from sfd_deploy.training.config import TrainConfig
teacher = resolve("fashion-mnist", "teacher")
assert len(judges_for(tuple(teacher.facts["labels"]["class_names"]))) == 2
TrainConfig.load("fashion-mnist", "train"), Policy.load("default", "policy"), _template()
print(sfd_deploy.training.losses.__file__, install.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, cwd=folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_carries_models_presets_templates_and_stages(unpacked: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    assert all(line.startswith(str(unpacked)) for line in output.stdout.split())
    assert (unpacked / "sfd_deploy" / "serving" / "triton-requirements.txt").is_file()
    assert (unpacked / "sfd_deploy" / "py.typed").is_file()


def test_a_wheel_carries_no_tests_and_no_caches(unpacked: Path):
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "runs")) or "__pycache__" in name]
