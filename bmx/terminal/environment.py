"""What ``bmx env`` shows: versions, devices, memory and kernels. Loads torch when it is asked."""

from __future__ import annotations

import os
import shutil
from typing import Any

from bmx import hardware
from bmx.config import EngineConfig
from bmx.kernels import Kernels
from bmx.terminal.tables import megabytes


def environment() -> list[tuple[str, str]]:
    """What a bug report needs: versions, devices, memory, kernels and why."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import platform, python_version

    import torch

    import bmx
    from bmx import kernels

    rows = [("bmx", bmx.__version__), ("python", f"{python_version()} on {platform()}")]
    for package in ("torch", "transformers", "tokenizers", "accelerate", "gguf", "triton", "nvidia-ml-py", "jsonlines"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    bf16 = "bfloat16 in hardware" if hardware.multiplies("bfloat16") else "no bfloat16 in hardware"
    rows.append(("cpu", f"{hardware.cpu_name()}, {hardware.usable_cores()} cores, {bf16}"))
    rows.append(("memory", _free(hardware.free_host_memory())))
    rows += [("gpu (NVML)", _gpu(gpu)) for gpu in hardware.gpus()]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        numbers = "bfloat16" if (major, minor) >= kernels.LEAST_CAPABILITY else "float16 (no bfloat16 in hardware)"
        shared = getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", 0) // 1024
        parts = [torch.cuda.get_device_name(), f"compute capability {major}.{minor}", numbers]
        parts += [f"{shared} KB of shared memory a block"] if shared else []
        rows.append(("gpu (CUDA)", ", ".join([*parts, _free(hardware.free_gpu_memory())])))
        compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("clang", "gcc"))), None)
        rows.append(("C compiler", compiler or "none (gcc or clang), which Triton needs"))
    chosen = _tried(kernels.choose("cuda")) if torch.cuda.is_available() else kernels.choose("cpu")
    rows.append(("attention", f"{chosen.name}: {chosen.why}"))
    if chosen.name != "reference":
        rows += [(name, f"in plain torch: {reason}") for name, reason in chosen.replaced.items()]
    rows.append(("demo model", _demo()))
    return rows


def _tried(chosen: Kernels) -> Kernels:
    """What is left of a GPU's kernels after a trial in the sizes of Llama 3.1 8B, with the default settings."""
    import torch

    from bmx.kernels.ranking import EvictionOrder
    from bmx.kernels.trial import tried
    from bmx.kernels.trial_inputs import Attention

    config = EngineConfig()
    order = EvictionOrder(by="average", sink=config.kv_sink, recent=config.kv_recent, window=None)
    layer = Attention(
        heads=32, kv_heads=8, key_dim=128, value_dim=128, order=order, formats=config.pair_formats, mass=True
    )
    return tried(chosen, [layer], torch.bfloat16, torch.device("cuda"))


def _free(memory: Any) -> str:
    return f"{megabytes(memory.free)} free of {megabytes(memory.total)} ({memory.source})"


def _gpu(gpu: hardware.Gpu) -> str:
    if gpu.mig:
        memory = "cut into MIG slices"
    elif gpu.unified:
        memory = "uses the host's memory"
    elif gpu.free is None or gpu.total is None:
        memory = "NVML may not say what is free"
    else:
        memory = f"{megabytes(gpu.free)} free of {megabytes(gpu.total)}"
    others = hardware.holders(gpu)
    return f"{gpu.name} at {gpu.pci or '?'}, {memory}" + (f"; {others}" if others else "")


def _demo() -> str:
    from bmx.errors import ModelError
    from bmx.model.demo import local_path

    try:
        return local_path("demo").name
    except ModelError as error:
        return f"not installed: {error.hint}"
