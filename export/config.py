"""How a generator is compiled: opset, batch range, calibration and the limits that a graph must keep."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sfd_deploy.config import StageConfig

Backend = Literal["onnx", "trt"]
Precision = Literal["fp32", "fp16", "int8"]
Target = Literal["cpu", "trt"]
Capability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
BACKENDS: tuple[Backend, ...] = ("onnx", "trt")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
LATENT_STREAM = "calibrate"


class ExportConfig(StageConfig):
    """Settings of ``export``; the defaults are what the command line uses."""

    # From 21 on GroupNorm stays one node, whose type ONNX's own inference (1.23) does not know, so that ranges could
    # not be checked; 23 adds Attention nodes that TensorRT for RTX cannot build.
    opset: int = Field(20, ge=18, le=20, description="ONNX operator set")
    min_batch: int = Field(1, ge=1, description="smallest batch of an engine")
    opt_batch: int = Field(16, ge=1, description="batch that an engine is tuned for")
    max_batch: int = Field(64, ge=1, description="largest batch of an artefact")
    seed: int = Field(0, ge=0, description="of the latents that calibrate and check")
    calibration_samples: int = Field(256, ge=32, description="latents that set the INT8 ranges")
    range_samples: int = Field(1024, ge=1000, description="latents over which every activation must stay in range")
    parity_samples: int = Field(256, ge=16, description="latents on which a graph is compared with PyTorch")
    max_difference_fp32: float = Field(1e-3, gt=0, description="largest pixel difference of an FP32 graph")
    min_psnr_db_fp16: float = Field(40.0, description="mean PSNR of an FP16 graph to PyTorch")
    min_psnr_db_int8: float = Field(20.0, description="mean PSNR of an INT8 graph to PyTorch")
    int8_exclude: tuple[str, ...] = Field(
        ("*conv_in*", "*conv_out*", "*time_emb*", "*conv_shortcut*"),
        description="node name patterns that stay FP32 in an INT8 graph",
    )
    int8_reduce_range: bool = Field(
        False, description="7-bit weights: for x86 CPUs without VNNI, where U8 times S8 sums saturate"
    )
    compute_capabilities: tuple[Capability, ...] = Field(
        ("SM75", "SM80", "SM86", "SM89", "SM120"), min_length=1, description="GPUs of a TensorRT for RTX engine"
    )

    @model_validator(mode="after")
    def batches_must_be_ordered(self) -> Self:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batches must rise: min {self.min_batch}, opt {self.opt_batch}, max {self.max_batch}")
        return self


class TextExportConfig(ExportConfig):
    """The same for text-to-image: fewer samples and smaller batches, as its networks are a hundred times larger."""

    opt_batch: int = Field(1, ge=1, description="batch that an engine is tuned for")
    max_batch: int = Field(8, ge=1, description="largest batch of an artefact")
    calibration_samples: int = Field(64, ge=16, description="latents and prompts that set the INT8 ranges")
    range_samples: int = Field(128, ge=16, description="latents and prompts over which activations must stay in range")
    parity_samples: int = Field(32, ge=16, description="latents and prompts on which graphs are compared with PyTorch")
    # Measured on CPUs: with the two products inside attention quantised, INT8 is slower than FP32.
    int8_exclude: tuple[str, ...] = Field(
        ("*conv_in*", "*conv_out*", "*time_emb*", "*conv_shortcut*", "*.attn1/*", "*.attn2/*"),
        description="node name patterns of the U-Net that stay FP32 in an INT8 graph",
    )
