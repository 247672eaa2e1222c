"""Two gloo processes against one: the same global batch, the same losses, the same end. No GPU needed."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sfd_deploy.errors import ConfigError
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.judge import train_judge
from sfd_deploy.training.teacher import train_teacher
from tests.training.one_of_many import train
from tests.training.test_teacher_and_judge import halves, judge_config, teacher_config

ROOT = Path(__file__).resolve().parents[2]
# In this order: what comes after "sharded" runs under FSDP2.
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {}, "parts": {"accumulate": 2}, "shared": {"share_generated": True}, "bf16": {"precision": "bf16"},
    "poisoned": {"poison": 1, "iterations": 10}, "interrupted": {"interrupt": 1}, "sharded": {"shard": True},
    "looked-at": {"look": 2}, "killed": {"folder": "goes-on", "stop": 2}, "goes-on": {},
}  # fmt: skip
ALONE = Workers(torch.device("cpu"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every scenario, started once."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.one_of_many", str(folder), json.dumps(SCENARIOS)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def found(folder: Path, name: str) -> tuple[Any, Any]:
    first, second = (json.loads((folder / f"{name}-{index}.json").read_text()) for index in (0, 1))
    return first, second


def alone(folder: Path, **changes: object) -> dict[str, Any]:
    return train(folder, changes, ALONE)


def close(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> bool:
    return len(one) == len(other) and all(
        math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=tolerance * 1e-2)
        for a, b in zip(one, other, strict=True) for name in a
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tolerance"), [("plain", 1e-4), ("parts", 1e-4), ("shared", 1e-4), ("bf16", 5e-2), ("sharded", 1e-4)]
)
def test_two_processes_give_the_losses_of_one(two_processes: Path, tmp_path: Path, name: str, tolerance: float):
    changes = {key: value for key, value in SCENARIOS[name].items() if key != "shard"}
    one, (first, second) = alone(tmp_path, **changes), found(two_processes, name)
    assert first["processes"] == 2
    assert bool(first["sharded"]) == (name == "sharded")
    assert first["record"] == second["record"]
    assert close(one["record"], first["record"], tolerance)
    other_seed = alone(tmp_path / "seed", **changes, seed=1)
    assert not close(other_seed["record"], first["record"], tolerance)  # the comparison can fail


def test_they_end_with_the_weights_of_one(two_processes: Path, tmp_path: Path):
    alone(tmp_path)
    ours = load_file(tmp_path / "weights.safetensors")
    for name in ("plain", "parts", "sharded"):
        theirs = load_file(two_processes / name / "weights.safetensors")
        # Adam's first steps move a weight by its sign: where a gradient is zero to rounding, by 2e-4 either way.
        assert all(torch.allclose(ours[key], theirs[key], atol=2e-3) for key in ours)
        assert sum((ours[key] - theirs[key]).abs().sum() for key in ours) < 1e-3 * sum(
            v.abs().sum() for v in ours.values()
        )


def test_a_sharded_training_that_one_process_rates_ends_with_the_fake_score_of_one_that_nobody_does(
    two_processes: Path,
):
    """Looks are in the first process alone: what it exports may not keep it from gathering with the others."""
    rated, unrated = (load_file(two_processes / name / "weights.safetensors") for name in ("looked-at", "sharded"))
    theta, psi = ({key for key in rated if key.startswith(f"{network}.")} for network in ("theta", "psi"))
    assert all(torch.equal(rated[key], unrated[key]) for key in psi)
    assert not all(torch.equal(rated[key], unrated[key]) for key in theta)  # step 2's average, not step 4's


def test_figures_of_gradients_are_those_of_every_shard(two_processes: Path, tmp_path: Path):
    (first, second), one = found(two_processes, "sharded"), alone(tmp_path)
    assert first["gradients"] == second["gradients"]
    for name, value in one["gradients"].items():
        assert first["gradients"][name] == pytest.approx(value, rel=0.05, abs=1e-3)


def test_gradients_are_exchanged_once_a_step_in_however_many_parts_a_batch_goes(two_processes: Path):
    plain, parts = (found(two_processes, name)[0]["exchanges"] for name in ("plain", "parts"))
    assert plain == parts == {"psi": 4, "theta": 4}


def test_the_shipped_file_shards_block_by_block(two_processes: Path):
    """By size it would wrap lists of modules in larger networks, which FSDP2 refuses, and nothing in this one."""
    assert "FSDPResnetBlock2D" in found(two_processes, "sharded")[0]["sharded"]


def test_a_flag_that_is_set_in_any_process_is_set_in_all(two_processes: Path):
    """The first is the second process' alone, the second nobody's, the third both's."""
    assert found(two_processes, "flags") == ([True, False, True], [True, False, True])


def test_processes_wait_hours_for_the_one_that_looks_and_seals(two_processes: Path):
    """NCCL's own default would end the training after ten minutes of a look, gloo's after thirty."""
    assert min(found(two_processes, "patience")) > 6 * 3600


def test_all_stop_together_when_one_of_them_diverges(two_processes: Path):
    """Its gradient alone is NaN, as a shard's may be: the other one's steps are skipped with it."""
    first, second = found(two_processes, "poisoned")
    assert first == second == {"stopped": "DivergedError", "step": 4, "skipped": 5}


def test_all_stop_together_when_one_of_them_is_interrupted(two_processes: Path):
    first, second = found(two_processes, "interrupted")
    assert first == second == {"stopped": "KeyboardInterrupt", "step": 2, "skipped": 0}


def test_a_sharded_training_goes_on_from_its_checkpoint_and_so_does_one_process(two_processes: Path, tmp_path: Path):
    killed, _ = found(two_processes, "killed")
    assert killed["stopped"] == "KeyboardInterrupt"
    unbroken, goes_on = found(two_processes, "sharded")[0], found(two_processes, "goes-on")[0]
    assert goes_on["record"] == unbroken["record"]
    one = alone(two_processes / "goes-on")  # finished there: the checkpoint of two opens in one
    assert one["record"] == goes_on["record"]


def test_a_process_whose_peer_was_killed_says_so_and_keeps_the_checkpoint(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(
        "{teacher: fashion-mnist, iterations: 500, retained_rows: 2, forget_rows: 2, forget: {1: 8}, precision: fp32,"
        " checkpoint_every: 1, monitor: {every: 0, tensorboard: false}}"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "SFD_DEPLOY_LOG": str(tmp_path / "bug.log"),
    }  # fmt: skip
    command = [sys.executable, "-m", "sfd_deploy", "train", "--config", "config.yaml", "-o", "run", "--device", "cpu"]
    first, second = (
        subprocess.Popen(
            command, cwd=tmp_path, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE,
            text=True,
        ) for rank in ("0", "1")
    )  # fmt: skip
    try:
        checkpoint, deadline = tmp_path / "run" / "work" / "checkpoint.safetensors", time.monotonic() + 300
        while not checkpoint.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        second.kill()
        said = first.communicate(timeout=120)[1]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert "error: another of the 2 processes ended: process 0 cannot train without it\n  mend: see what" in said
    assert not (tmp_path / "bug.log").exists()
    with safe_open(checkpoint, framework="pt") as handle:
        assert int(handle.metadata()["step"]) >= 1


def test_a_teacher_and_a_judge_are_trained_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="teacher: is trained by one process, and 2 were launched"):
        train_teacher(teacher_config(), halves(8, 0), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="judge: is trained by one process, and 2 were launched"):
        train_judge(judge_config(), halves(8, 0), tmp_path / "b.safetensors")


@pytest.mark.parametrize("count", [1, 2])
def test_our_own_bugs_are_no_lost_processes(count: int):
    with pytest.raises(RuntimeError, match="ours"), replace(ALONE, count=count).needing_each_other():
        raise RuntimeError("ours")
