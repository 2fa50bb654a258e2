"""What multiplies int8 weights on a CPU: compiled kernels, torch's library FBGEMM, or nothing. Loads no torch.

FBGEMM is chosen where it is faster than torch's product in the model's own type, as measured for that type and these
instruction sets; elsewhere int8 weights are refused.
"""

from __future__ import annotations

import sys
from typing import Any

from bmx import hardware
from bmx.kernels import Kernels

BLOCK = 512  # inputs in a block of FBGEMM's weights
OUTPUT_BYTES = 16  # FBGEMM's scale, zero and sum of an output, and bmx's own correction
FASTER = {"bfloat16": "amx_bf16", "float16": "amx_fp16"}  # types that torch multiplies faster with these instructions


def takes(kernels: Kernels, dtype: str, outputs: int, inputs: int) -> bool:
    """Whether compiled kernels multiply the int8 weights of a layer.

    Args:
        kernels: the chosen ones.
        dtype: torch's name of the model's type.
        outputs: of the layer (O).
        inputs: of the layer (I).
    """
    sizes = kernels.capabilities.int8_multiples
    if sizes is None or dtype not in kernels.capabilities.model_dtypes:
        return False
    return outputs % sizes[0] == 0 and inputs % sizes[1] == 0


def why_no_library(dtype: str) -> str:
    """Why FBGEMM would be slower on this machine than a product in the model's own type, or an empty string.

    Args:
        dtype: torch's name of the model's type.
    """
    flags = hardware.cpu_flags()
    if "avx2" not in flags:
        return "torch's library for them, FBGEMM, needs AVX2"
    torch: Any = sys.modules.get("torch")
    if torch is not None and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of torch lacks FBGEMM, its library for them"
    if FASTER.get(dtype) in flags:
        return f"this processor multiplies {dtype} in AMX, which torch's library for int8, FBGEMM, does not use"
    return ""


def why_refused(kernels: Kernels, dtype: str) -> str:
    """Why int8 weights would be slower here than a model's own, or an empty string.

    Args:
        kernels: the chosen ones.
        dtype: torch's name of the model's type.
    """
    if takes(kernels, dtype, 0, 0):
        return ""
    reason = why_no_library(dtype)
    return f"{reason}; kernels: {kernels.why}" if reason else ""


def packed_bytes(outputs: int, inputs: int) -> int:
    """Bytes of a layer's weights in FBGEMM, which fills the last block of inputs up.

    Args:
        outputs: of the layer (O).
        inputs: of the layer (I).
    """
    return outputs * (-(-inputs // BLOCK) * BLOCK + OUTPUT_BYTES)
