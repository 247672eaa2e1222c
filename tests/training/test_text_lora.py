"""LoRA: one base for three networks, adapters alone are trained and saved, and what is sealed is a plain pipeline."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sfd_deploy.cli.main import exit_code_of
from sfd_deploy.errors import ConfigError
from sfd_deploy.models.text.generator import load_text_generator
from sfd_deploy.runs import Run
from sfd_deploy.training.course import Course
from sfd_deploy.training.distributed import Workers
from sfd_deploy.training.estimate import estimate
from sfd_deploy.training.loop import SfdLoop, Start
from sfd_deploy.training.lora import adapted_start, merged, require_targets
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_inputs import load_text_start, open_text_inputs
from sfd_deploy.training.text_stage import text_teacher
from tests.text_world import small_unet, text_parts, text_pipeline
from tests.training.text_loop import PROMPTS, VALUES, config_values

RANK = 3
LORA = {"rank": RANK, "alpha": 6}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET = "unet/diffusion_pytorch_model.safetensors"


def lora_loop(**changes: Any) -> SfdLoop:
    config = TextTrainConfig.from_mapping(VALUES | {"lora": LORA} | changes, "test")
    phi = text_teacher(config, PROMPTS, copy.deepcopy(text_parts()))
    assert config.lora is not None
    start = adapted_start(phi, Start(), config.lora, config.seed)
    return SfdLoop(config, PROMPTS, phi, start, guidance=config.guidance.bind(PROMPTS))


def adapter(network: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def base(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Every weight that is not the adapter's, by the name it has without one."""
    return {name.replace(".base_layer", ""): weight for name, weight in unet.named_parameters() if "lora" not in name}


def networks(loop: SfdLoop) -> list[UNet2DConditionModel]:
    average: Any = loop.ema.network
    return [net.unet.unet for net in (loop.generator.denoiser, loop.fake_score, average.denoiser)]


def test_teacher_generator_fake_score_and_average_are_one_set_of_weights_in_memory():
    loop = lora_loop()
    weights = {name: value.data_ptr() for name, value in loop.teacher.unet.unet.named_parameters()}
    for unet in networks(loop):
        assert {name: value.data_ptr() for name, value in base(unet).items()} == weights


def test_training_moves_the_adapters_apart_and_no_bit_of_the_base():
    loop = lora_loop()
    before = {name: value.clone() for name, value in loop.teacher.unet.unet.state_dict().items()}
    starts = [adapter(network) for network in (loop.generator, loop.fake_score)]
    for step in range(3):
        loop.iterate(step)
    assert all(torch.equal(value, before[name]) for name, value in loop.teacher.unet.unet.state_dict().items())
    for unet in networks(loop):
        assert all(torch.equal(value, before[name]) for name, value in base(unet).items())
    theta, psi = adapter(loop.generator), adapter(loop.fake_score)
    for ends, start in ((theta, starts[0]), (psi, starts[1])):
        assert not any(torch.equal(one, other) for one, other in zip(ends, start, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(theta, psi, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(theta, adapter(loop.ema.network), strict=True))


def test_the_optimisers_hold_rank_times_inputs_and_outputs_of_every_target():
    loop = lora_loop()
    expected = sum(
        RANK * (layer.in_features + layer.out_features) for name, layer in small_unet().named_modules()
        if name.endswith(ATTENTION)
    )  # fmt: skip
    assert expected > 0
    for network, adam in ((loop.generator, loop.generator_adam), (loop.fake_score, loop.fake_score_adam)):
        held = [weight for group in adam.param_groups for weight in group["params"]]
        assert sum(weight.numel() for weight in held) == expected
        assert sum(weight.numel() for weight in network.parameters()) == expected


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "gradient_checkpointing": True, "accumulate": 2}])
def test_an_untrained_adapter_changes_nothing(changes: dict[str, object]):
    loop = lora_loop(**changes)
    noisy, sigma, asked = torch.randn(3, 4, 8, 8), torch.full((3,), 2.5), torch.tensor([1, 2, 3])
    with torch.no_grad():
        plain, theta, psi = (net(noisy, sigma, asked) for net in (loop.teacher, loop.theta, loop.fake_score))
    assert torch.equal(plain, theta)
    assert torch.equal(plain, psi)
    loop.iterate(0)
    loop.iterate(1)
    with torch.no_grad():
        assert not torch.equal(plain, loop.theta(noisy, sigma, asked))
        assert torch.equal(plain, loop.teacher(noisy, sigma, asked))


def test_a_checkpoint_holds_the_adapters_alone(tmp_path: Path):
    loop = lora_loop()
    course = Course(loop, tmp_path / "checkpoint.safetensors")
    course.run()
    held = load_file(tmp_path / "checkpoint.safetensors")
    networks = {key: value for key, value in held.items() if not key.split("/")[0].endswith("adam")}
    assert {key.split("/")[0] for key in networks} == {"generator", "fake_score", "ema"}
    count = sum(weight.numel() for weight in loop.generator.parameters())
    assert sum(value.numel() for value in networks.values()) == 3 * count


def test_the_estimate_before_training_leaves_no_trace():
    loop = lora_loop()
    loop.iterate(0)
    networks = [loop.generator, loop.fake_score, loop.ema.network]
    before = [adapter(network) for network in networks]
    estimate(loop.iterate, 10, networks=networks, optimisers=[loop.generator_adam, loop.fake_score_adam])
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(adapter(network), weights, strict=True))


def test_merging_adds_the_scaled_product_of_the_two_matrices():
    loop = lora_loop()
    loop.iterate(0)
    loop.iterate(1)
    plain = merged(loop.fake_score).unet.unet
    layer = loop.fake_score.unet.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = layer.base_layer.weight + 6 / RANK * up @ down
    assert torch.allclose(plain.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight, expected, atol=1e-7)
    assert plain.state_dict().keys() == small_unet().state_dict().keys()
    assert not torch.equal(expected, layer.base_layer.weight)


def write_config(folder: Path, teacher: Path, **changes: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps(config_values(folder, teacher, **{"lora": LORA} | changes)), encoding="utf-8")
    return file


def train(file: Path, output: Path) -> int:
    return exit_code_of(["train", "--config", str(file), "-o", str(output)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("teachers") / "tiny-sd")


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    # As high a rate as makes what three iterations change visible in an image.
    file = write_config(folder, teacher, generator_rate=0.05, fake_score_rate=0.05, ema_decay=0.0)
    assert train(file, folder / "run") == 0
    return Run(folder / "run")


PROMPT_LIST = ["the sandal", "a green bag"]


def drawn(pipe: StableDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(PROMPT_LIST, num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt").images
    return torch.as_tensor(images * 2 - 1)


def test_stock_diffusers_draws_the_same_from_the_merged_folder_and_from_the_teacher_with_the_adapter(
    run: Run, teacher: Path
):
    sealed = run.generator()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_text_generator(sealed, PROMPT_LIST)(latents, torch.tensor([0, 1]))
    assert torch.allclose(drawn(StableDiffusionPipeline.from_pretrained(sealed.folder)), ours, atol=1e-4)
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = StableDiffusionPipeline.from_pretrained(sealed.folder).scheduler
    untrained = drawn(pipe)
    pipe.load_lora_weights(sealed.folder / "lora")
    assert torch.allclose(drawn(pipe), ours, atol=1e-4)
    assert not torch.allclose(untrained, ours, atol=1e-2)


def test_a_sealed_run_is_of_plain_networks_and_a_small_adapter(run: Run, teacher: Path):
    start = load_file(teacher / UNET)
    for folder in ("generator", "fake-score"):
        trained = load_file(run.folder / folder / UNET)
        assert trained.keys() == start.keys()
        moved = {name for name in start if not torch.equal(trained[name], start[name])}
        assert moved == {f"{name}.weight" for name, _ in small_unet().named_modules() if name.endswith(ATTENTION)}
        assert "peft" not in (run.folder / folder / "unet" / "config.json").read_text()
    files = run.generator().manifest.files
    assert files["lora/pytorch_lora_weights.safetensors"].bytes < files[UNET].bytes / 2


def test_two_trainings_of_one_config_end_with_the_same_bytes(run: Run, tmp_path: Path):
    assert train(run.folder.parent / "config.yaml", tmp_path / "again") == 0
    assert Run(tmp_path / "again").generator().manifest.files == run.generator().manifest.files


def test_a_later_run_trains_an_adapter_on_each_network_of_the_earlier_one(run: Run, teacher: Path, tmp_path: Path):
    file = write_config(tmp_path, teacher, init_from=str(run.folder), forget_phrase=None)
    config = TextTrainConfig.from_mapping(json.loads(file.read_text()), "test")
    assert config.lora is not None
    inputs = open_text_inputs(config, tmp_path / "work")
    phi = text_teacher(config, inputs.prompts, copy.deepcopy(text_parts()))
    start = adapted_start(phi, load_text_start(inputs, config, phi), config.lora, config.seed)
    loop = SfdLoop(config, inputs.prompts, phi, start)
    for network, folder in ((loop.generator.denoiser, "generator"), (loop.fake_score, "fake-score")):
        earlier = load_file(run.folder / folder / UNET)
        assert all(torch.equal(weight, earlier[name]) for name, weight in base(network.unet.unet).items())
    taught = load_file(teacher / UNET)
    assert all(torch.equal(weight, taught[name]) for name, weight in loop.teacher.unet.unet.named_parameters())
    assert networks(loop)[0].conv_in.weight.data_ptr() == networks(loop)[2].conv_in.weight.data_ptr()
    assert train(file, tmp_path / "later") == 0
    assert Run(tmp_path / "later").generator().facts["iterations"] == 3


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "`lora.rank`"),
        ({"alpha": 0}, "`lora.alpha`"),
        ({"targets": []}, "`lora.targets`"),
        ({"rnak": 4}, "unknown key `lora.rnak`"),
        ({"targets": ["to_q", "to_qq"]}, "lora.targets: to_qq is no layer of the U-Net"),
        ({"targets": ["q"]}, "lora.targets: q is no layer of the U-Net"),
        ({"targets": ["norm1"]}, "lora.targets: norm1 is a LayerNorm, without a matrix"),
    ],
)
def test_a_lora_that_cannot_be_is_one_line_exit_two_and_seals_nothing(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: dict[str, Any], message: str
):
    assert train(write_config(tmp_path, teacher, lora=lora), tmp_path / "run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run" / "generator").exists()


def test_targets_that_match_nothing_are_met_with_the_names_of_layers():
    with pytest.raises(ConfigError) as caught:
        require_targets(small_unet(), ["attn"])
    assert all(name in str(caught.value.mend) for name in ("to_q", "to_k", "to_v", "to_out.0", "conv1"))


def test_without_peft_the_one_line_says_what_to_install(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(write_config(tmp_path, teacher), tmp_path / "run") == 2
    assert "pip install 'sfd-deploy[t2i]'" in capsys.readouterr().err


def test_sharding_and_lora_are_refused_together(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Workers, "is_sharded", True)
    assert train(write_config(tmp_path, teacher), tmp_path / "run") == 2
    assert "lora with FSDP2" in capsys.readouterr().err


def test_convolutions_can_be_targets_too():
    loop = lora_loop(lora={"rank": 2, "alpha": 2, "targets": ["conv1"]})
    expected = sum(
        2 * (conv.in_channels * 9 + conv.out_channels) for name, conv in small_unet().named_modules()
        if name.endswith("conv1")
    )  # fmt: skip
    assert sum(weight.numel() for weight in loop.generator.parameters()) == expected
    loop.iterate(0)
    merged(loop.generator.denoiser)
