"""Where products of float8 weights run: on GPUs whose matrix units multiply 8-bit floats. Loads no torch."""

from __future__ import annotations

import sys
from typing import Any

LEAST_CAPABILITY = (8, 9)  # Ada
MULTIPLE = 16  # numbers that inputs and outputs of a layer must be multiples of
OUTPUT_BYTES = 4  # of a layer's output: its scale
DTYPE = "bfloat16"


def takes(outputs: int, inputs: int) -> bool:
    """Whether float8 weights of a layer can be multiplied.

    Args:
        outputs: of the layer (O).
        inputs: of the layer (I).
    """
    return outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0


def why_refused(dtype: str) -> str:
    """Why the GPU cannot multiply float8 weights, or an empty string; a GPU elsewhere is expected to be able to.

    Args:
        dtype: torch's name of the model's type.
    """
    if dtype != DTYPE:
        return f"its products come out in {DTYPE}, and the model computes in {dtype}"
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        return f"it needs a GPU of compute capability 8.9 or later (Ada, Hopper), and {name} has {major}.{minor}"
    return ""
