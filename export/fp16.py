"""FP32 graph to FP16 by ONNX Runtime's own converter; inputs and output stay FP32."""

from __future__ import annotations

from onnx import ModelProto

from sfd_deploy.export.graph import tidy
from sfd_deploy.export.weights import fits_one_file


def to_fp16(model: ModelProto) -> ModelProto:
    """``model`` with FP16 weights and arithmetic.

    Check its range first (``ranges.require_range``): the converter clamps what does not fit.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = ModelProto()
    copy.CopyFrom(model)  # the converter changes what it is given
    # A graph of ours has its types; inferring them again takes the bytes that one message cannot hold.
    return tidy(convert_float_to_float16(copy, keep_io_types=True, disable_shape_infer=not fits_one_file(model)))
