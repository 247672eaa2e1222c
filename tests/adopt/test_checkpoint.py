from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_deploy.adopt import child
from sfd_deploy.adopt.checkpoint import read_checkpoint
from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import ModelError
from sfd_deploy.manifest import verify
from sfd_deploy.models.generator import load_generator
from tests.adopt.official import OfficialUNet, one_step, random_network, saved_list, seeded


class Trap:
    """Unpickled the ordinary way, it would run a command."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.touched}",))


def convert(file: Path, run: Path, *more: str) -> int:
    return exit_code_of(["adopt", "--convert", str(file), "-o", str(run), "--image-size", "8", *more])


@pytest.fixture(scope="module")
def converted(official_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "converted"
    assert convert(official_file, run, "--class-names", "circle,square,star", "--forget", "square=star") == 0
    return run


def test_the_converted_run_draws_the_official_images_of_its_ema_for_every_label(
    official_network: OfficialUNet, converted: Path
):
    generator = load_generator(verify(converted / "generator", "generator"))
    labels = torch.arange(12) % 3
    with seeded(4):
        noise = torch.randn(12, 3, 8, 8)
    expected = one_step(official_network, noise, labels)
    assert expected.std() > 0.3
    torch.testing.assert_close(generator(noise, labels), expected, rtol=0, atol=1e-4)


def test_the_run_records_what_it_was_converted_from_and_claims(official_file: Path, converted: Path):
    sealed = verify(converted / "generator", "generator")
    assert sealed.facts["adopted"] | {"sha256": ""} == {
        "layout": "official DDPM", "entry": "ema", "step": 49_999, "timestep": 440,
        "null_label_dropped": True, "sha256": "",
    }  # fmt: skip
    assert sealed.facts["labels"] == {"class_names": ["circle", "square", "star"], "forget": {"1": 2}}
    assert sealed.facts["sigma_init"] == pytest.approx(2.502, abs=5e-4)  # the published noise level of t = 440
    parent = sealed.manifest.parents[0]
    assert (parent.kind, parent.name, parent.digest) == ("generator", official_file.name,
                                                         sealed.facts["adopted"]["sha256"])  # fmt: skip


@pytest.mark.usefixtures("no_child")
def test_a_remap_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    network = random_network()
    network.classes_emb.weight.data[1] = network.classes_emb.weight.data[2]
    torch.save(saved_list(network), tmp_path / "ckpt.pth")
    assert convert(tmp_path / "ckpt.pth", tmp_path / "run", "--forget", "1=2") == 2
    assert "a remap, not forgetting" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pickle_that_would_run_a_command_is_refused_in_one_line_and_runs_nothing(
    official_network: OfficialUNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    states = saved_list(official_network)
    states[1] = Trap(tmp_path / "touched")
    torch.save(states, tmp_path / "ckpt.pth")
    assert convert(tmp_path / "ckpt.pth", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "asks for posix.system; nothing of it was run" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 2  # what was wrong, and the mend
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pth"]


def test_the_format_before_zip_files_runs_nothing_either(tmp_path: Path):
    torch.save(Trap(tmp_path / "touched"), tmp_path / "ckpt.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system"):
        child.extract(tmp_path / "ckpt.pth", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pth"]


def test_the_trap_is_a_trap(tmp_path: Path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("network-snapshot.pkl", pickle.dumps({"ema": Trap(Path("/nonexistent/touched"))}), "run its code"),
        ("notes.pth", b"not a checkpoint", "is not a PyTorch checkpoint"),
        ("empty.pth", b"", "is not a PyTorch checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused_before_a_child_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name, content, message
):
    monkeypatch.setattr("sfd_deploy.adopt.checkpoint._run_child", lambda *_: pytest.fail("a child was started"))
    (tmp_path / name).write_bytes(content)
    assert convert(tmp_path / name, tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert convert(tmp_path / "absent.pth", tmp_path / "run") == 2
    assert "absent.pth: cannot be read (No such file" in capsys.readouterr().err


def test_a_few_bytes_that_claim_terabytes_are_refused_within_the_memory_limit(tmp_path: Path):
    torch.save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "bomb.pth")
    with pytest.raises(ModelError, match="claims more memory"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_the_time_limit_ends_the_child(official_file: Path):
    with pytest.raises(ModelError, match="more than 0 s"):
        read_checkpoint(official_file, seconds=0)


@pytest.mark.usefixtures("no_child")
def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    torch.save({"conv_in.weight": torch.tensor([float("nan")])}, tmp_path / "nan.pth")
    with pytest.raises(ModelError, match=r"conv_in\.weight holds numbers that are not finite"):
        read_checkpoint(tmp_path / "nan.pth")


def test_the_child_takes_the_ema_else_the_generator_and_never_a_teacher():
    def weights(value: float) -> dict[str, torch.Tensor]:
        return {"a": torch.tensor([float(value)])}

    full = [weights(0), {"state": {}}, weights(2), {"state": {}}, 7, weights(5)]
    early = [None, None, weights(2), None, 7, weights(5)]
    cases = {"ema": full, "generator": full[:5], "teacher": [weights(0), {}, 7, weights(3)], "state dict": weights(1)}
    assert {name: child.generator_entry(states)[0] for name, states in cases.items()} == {name: name for name in cases}
    assert child.generator_entry(full)[1] is full[5]
    assert child.generator_entry(early)[1] is early[5]
    assert child.generator_entry(full[:5])[1] is full[2]
    assert child.generator_entry(cases["teacher"])[1] is None
    assert child.step_of(full) == 7
    for unknown in ([], {}, {"epoch": 3}, tuple(full), full * 2, {"a": torch.tensor([1])}):
        assert child.generator_entry(unknown) == ("unknown", None)


@pytest.mark.parametrize(("entry", "message"), [("teacher", "holds a teacher"), ("unknown", "unknown layout, a list")])
def test_what_the_child_found_decides(official_file: Path, monkeypatch: pytest.MonkeyPatch, entry, message):
    found = {"entry": entry, "step": None, "found": "a list of 4"}
    monkeypatch.setattr("sfd_deploy.adopt.checkpoint._run_child", lambda *_: found)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(official_file)


def test_names_of_a_parallel_wrapper_are_made_plain(official_network: OfficialUNet, tmp_path: Path):
    from safetensors.torch import load_file

    states = saved_list(official_network)
    states[5] = {f"module.{name}": value for name, value in states[5].items()}
    torch.save(states, tmp_path / "parallel.pth", _use_new_zipfile_serialization=False)
    found = child.extract(tmp_path / "parallel.pth", tmp_path / "out.safetensors")
    assert found == {"entry": "ema", "step": 49_999, "found": "a list of 6"}
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], value) for name, value in official_network.named_parameters())


@pytest.mark.usefixtures("no_child")
def test_the_image_size_and_the_timestep_are_checked(
    official_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert exit_code_of(["adopt", "--convert", str(official_file), "-o", str(tmp_path / "run")]) == 2
    assert "say it with --image-size, likely 32" in capsys.readouterr().err
    assert convert(official_file, tmp_path / "run", "--timestep", "1000") == 2
    assert "use 0 to 999" in capsys.readouterr().err
