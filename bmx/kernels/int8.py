"""What multiplies int8 weights on a CPU: compiled kernels, torch's library FBGEMM, or nothing. Loads no torch.

FBGEMM is chosen where it is faster than torch's product in the model's own type, as measured for that type, these
instruction sets and layers of this size; small layers stay as they are, and other types and processors are refused.
"""

from __future__ import annotations

import sys
from typing import Any

from bmx import hardware
from bmx.kernels.contract import Capabilities

LEAST_WEIGHTS = 2**18  # of a layer: rounding the inputs of a smaller one takes longer than FBGEMM saves
BLOCK = 512  # inputs in a block of FBGEMM's weights
OUTPUT_BYTES = 16  # FBGEMM's scale, zero and sum of an output, and bmx's own correction
FASTER = {"bfloat16": "amx_bf16", "float16": "amx_fp16"}  # types that torch multiplies faster with these instructions


def takes(kernels: Capabilities, dtype: str, outputs: int, inputs: int) -> bool:
    """Whether compiled kernels multiply the int8 weights of a layer.

    Args:
        kernels: what the chosen ones take over.
        dtype: torch's name of the model's type.
        outputs: of the layer (O).
        inputs: of the layer (I).
    """
    sizes = kernels.int8_multiples
    if sizes is None or dtype not in kernels.model_dtypes:
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


def why_refused(kernels: Capabilities, dtype: str) -> str:
    """Why int8 weights would be slower here than a model's own, or an empty string.

    Args:
        kernels: what the chosen ones take over.
        dtype: torch's name of the model's type.
    """
    return "" if takes(kernels, dtype, 0, 0) else why_no_library(dtype)


def packed_bytes(outputs: int, inputs: int) -> int:
    """Bytes of a layer's weights in FBGEMM, which fills the last block of inputs up.

    Args:
        outputs: of the layer (O).
        inputs: of the layer (I).
    """
    return outputs * (-(-inputs // BLOCK) * BLOCK + OUTPUT_BYTES)
