"""Text-to-image generator to three ONNX graphs: text encoder, U-Net, VAE decoder; FP32, any batch size.

They have the names of Optimum's inputs and outputs. What lies between two networks is inside a graph, so that
each one's output is the next one's input as it is: the U-Net takes standard-normal latents and gives clean
ones, the whole step inside; the decoder divides by the VAE's scaling factor and clamps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, ValueInfoProto, numpy_helper
from torch import Tensor, nn

from sfd_deploy.errors import GraphError, ModelError
from sfd_deploy.export.graph import trace
from sfd_deploy.models.denoiser import DiscreteDenoiser
from sfd_deploy.models.generator import OneStepGenerator, image_shape
from sfd_deploy.models.text.folder import TextParts
from sfd_deploy.models.text.generator import decode
from sfd_deploy.runtime.text import Part

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

Graphs = dict[Part, ModelProto]
OUTPUTS: dict[Part, str] = {
    "text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"
}  # fmt: skip
# Whose output is whose input.
JOINTS: tuple[tuple[Part, Part, str], ...] = (
    ("text_encoder", "unet", "encoder_hidden_states"),
    ("unet", "vae_decoder", "latent_sample"),
)
UNREAD = "timestep"
MASKED = np.float32(-1e4)  # softmax gives such a place 0, as it does the lowest float, and FP16 can hold it


class _Encoder(nn.Module):
    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        encoded: Tensor = self.text_encoder(input_ids)[0]
        return encoded


class _EncodedUNet(nn.Module):
    """A denoiser's U-Net whose condition is the encoded prompt itself."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states=class_labels)


class _Step(nn.Module):
    """The whole step; its noise level is a constant."""

    def __init__(self, parts: TextParts, sigma_init: float) -> None:
        super().__init__()
        self.step = OneStepGenerator(DiscreteDenoiser(_EncodedUNet(parts.unet), parts.scheduler), sigma_init)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.step.unclamped(sample, encoder_hidden_states)


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return decode(self.vae, latent_sample)


def trace_text_generator(parts: TextParts, sigma_init: float, opset: int) -> Graphs:
    """The three FP32 graphs of one generator, their joints checked.

    Raises:
        ModelError: the text encoder reads an attention mask.
        GraphError: an operation that cannot be exported, or a joint that does not fit.
    """
    if getattr(parts.text_encoder.config, "use_attention_mask", False):
        raise ModelError(
            f"{parts.folder}: its text encoder reads an attention mask", "only encoders that read none are exported"
        )
    config = parts.text_encoder.config
    latents = torch.zeros(2, *image_shape(parts.unet))
    inputs: dict[Part, tuple[nn.Module, dict[str, Tensor]]] = {
        "text_encoder": (
            _Encoder(parts.text_encoder),
            {"input_ids": torch.zeros(2, config.max_position_embeddings, dtype=torch.int32)},
        ),
        "unet": (
            _Step(parts, sigma_init),
            {"sample": latents,
             "encoder_hidden_states": torch.zeros(2, config.max_position_embeddings, config.hidden_size)},
        ),
        "vae_decoder": (_Decoder(parts.vae), {"latent_sample": latents}),
    }  # fmt: skip
    graphs = {part: trace(module.eval(), example, [OUTPUTS[part]], opset) for part, (module, example) in inputs.items()}
    graphs["text_encoder"] = with_finite_mask(graphs["text_encoder"])
    require_joints(graphs)
    return graphs


def with_finite_mask(model: ModelProto) -> ModelProto:
    """``model`` with its causal mask's lowest float replaced by one that FP16 holds; softmax gives the same zeros."""
    lowest = np.finfo(np.float32).min
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and set(np.unique(values)) == {lowest, np.float32(0)}:
            tensor.CopyFrom(numpy_helper.from_array(np.maximum(values, MASKED), tensor.name))
    return model


def require_joints(graphs: Mapping[Part, ModelProto]) -> None:
    """Refuse graphs of which one's output is not what the next one takes.

    Raises:
        GraphError: naming the joint and what each side says.
    """
    for source, target, name in JOINTS:
        given = _signature(graphs[source].graph.output[0])
        taken = next((_signature(item) for item in graphs[target].graph.input if item.name == name), "nothing")
        if given != taken:
            raise GraphError(
                f"{source} gives {graphs[source].graph.output[0].name} {given}, {target} takes {name} {taken}",
                "take all parts from one pipeline",
            )


def with_unread_timestep(unet: ModelProto) -> ModelProto:
    """The U-Net's graph with the input that pipelines feed; the only timestep that it knows is a constant inside."""
    copy = ModelProto()
    copy.CopyFrom(unet)
    copy.graph.input.insert(1, onnx.helper.make_tensor_value_info(UNREAD, onnx.TensorProto.FLOAT, []))
    return copy


def _signature(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(str(dim.dim_param or dim.dim_value) for dim in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type)} ({dims})"
