from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_deploy.adopt.official import read_architecture, to_stock
from sfd_deploy.errors import ConfigError, ModelError
from tests.adopt.official import OfficialUNet, random_network

SHAPES: list[dict[str, Any]] = [
    {},
    {"multipliers": (1, 2, 2), "layers": 2, "size": 16, "classes": 5, "attention_at": 8},
    {"width": 64, "multipliers": (1, 1, 2), "size": 16, "attention_at": 16, "channels": 1, "classes": 40},
    {"multipliers": (1, 2), "attention_at": 0},
]


def tensors_of(network: OfficialUNet) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def both(network: OfficialUNet, asked: float = 440.0, converted_at: float = 440.0) -> tuple[Tensor, Tensor]:
    """What the literal network and the converted one predict, for every label on the same noise."""
    tensors = tensors_of(network)
    unet = to_stock(tensors, read_architecture(tensors, network.size), converted_at)
    labels = torch.arange(network.classes)
    noise = torch.randn(network.classes, *(tensors["conv_in.weight"].shape[1], network.size, network.size),
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    return network(noise, asked, labels), unet(noise, torch.tensor(asked), class_labels=labels).sample


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stock_network_predicts_what_the_official_one_does_for_every_label(shape: dict[str, Any]):
    literal, stock = both(random_network(**shape))
    assert literal.std() > 0.1
    torch.testing.assert_close(stock, literal, rtol=0, atol=2e-5)


def test_labels_and_timestep_shape_the_prediction_so_that_the_comparison_can_fail():
    network = random_network()
    literal, stock = both(network, converted_at=430.0)
    assert (stock - literal).abs().max() > 1e-2
    labels = torch.arange(3)
    assert (network(literal, 440.0, labels) - network(literal, 440.0, labels.roll(1))).std() > 0.1


def test_the_null_label_is_left_behind():
    network = random_network()
    _, before = both(network)
    network.null_classes_emb.mul_(100)
    _, after = both(network)
    assert torch.equal(before, after)
    tensors = tensors_of(network)
    assert to_stock(tensors, read_architecture(tensors, 8), 440.0).class_embedding.num_embeddings == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mid.attn_1.q.weight"), "mid.attn_1.q.weight is missing"),
        (lambda t: t.pop("classes_emb.weight"), "classes_emb.weight is missing"),
        (lambda t: t.pop("down.0.downsample.conv.weight"), "halves images by averaging"),
        (lambda t: t.update({"logvar": torch.zeros(1000)}), "logvar has no place in it"),
        (lambda t: t.update({"temb.dense.0.weight": torch.zeros(9, 9)}), "temb.dense.0.weight has shape"),
        (lambda t: t.update({"conv_in.weight": torch.zeros(64, 3, 3, 3)}), "the input layer 64"),
        (lambda t: t.update({"down.1.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)}), "multiples of 32"),
        (lambda t: t.clear() or t.update({"model.map_layer0.weight": torch.zeros(1), "model.dec.32x32_aux_conv.w": 1}),
         r"SongUNet.*sqrt\(1/2\)"),
        (lambda t: t.clear() or t.update({"model.map_layer0.weight": torch.zeros(1)}), "ADM"),
        (lambda t: t.clear() or t.update({"weight": torch.zeros(1)}), "conv_in.weight is missing"),
    ],
)  # fmt: skip
def test_other_networks_are_refused_by_name(change, message):
    tensors = tensors_of(random_network())
    change(tensors)
    with pytest.raises(ModelError, match=message):
        to_stock(tensors, read_architecture(tensors, 8), 440.0)


def test_the_image_size_is_asked_for_with_the_likely_one():
    tensors = tensors_of(random_network(multipliers=(1, 2, 2), attention_at=4))
    with pytest.raises(ConfigError, match="likely 32"):
        read_architecture(tensors, None)
    with pytest.raises(ConfigError, match="18 pixels cannot be halved 2 times"):
        read_architecture(tensors, 18)
