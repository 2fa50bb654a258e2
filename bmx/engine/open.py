"""From settings to a loaded model: what is checked before weights are read, and what is set up for the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from bmx import hardware
from bmx.compress.policy import CompressionPolicy
from bmx.config import FAKE, EngineConfig
from bmx.engine.backend import Backend, ModelBackend
from bmx.engine.fake import FakeBackend, FakeTokenizer
from bmx.engine.memory_meter import bound_kernel_caches
from bmx.errors import PreviewError, UsageError
from bmx.kernels import choose
from bmx.kv.places import DEVICE, check_place
from bmx.model.instructions import INSTRUCTIONS, Instructions
from bmx.model.loader import RUNTIME_BYTES, check_libraries, choose_device, load_model, load_tokenizer
from bmx.model.preview import preview_spec
from bmx.model.source import find_source
from bmx.model.spec import ModelSpec
from bmx.model.spec_settings import under_settings
from bmx.plan.builder import PlanBuilder
from bmx.plan.device import Device
from bmx.plan.memory import limits
from bmx.plan.planner import Length
from bmx.prompt_config import PromptConfig


def open_model(config: EngineConfig) -> tuple[Any, Backend]:
    """The tokenizer and the model that the settings name.

    Raises:
        ModelError: it cannot be found, loaded, or run correctly.
        MemoryLimitError: not even one short sequence would fit beside it.
        UsageError: settings that this model cannot follow.
    """
    if config.model == FAKE:
        return FakeTokenizer(), FakeBackend()
    check_libraries()
    bound_kernel_caches()
    source = find_source(config)
    tokenizer = load_tokenizer(source, config)
    check_memory(config, partial(preview_spec, config))
    use_all_cores(config.tensor_parallel_size)
    if config.tensor_parallel_size > 1:
        from bmx.engine.group_backend import GroupBackend

        return tokenizer, GroupBackend(config, source, tokenizer)
    return tokenizer, ModelBackend(load_model(source, config, tokenizer))


def check_cache(config: EngineConfig, prompt: PromptConfig) -> None:
    """Refuse settings of the cache that contradict each other or cannot be followed, before anything is loaded.

    Raises:
        UsageError: they do.
    """
    CompressionPolicy.from_config(config)
    if config.archives:
        check_place(config.kv_archive_place, "cuda" if config.device != "cpu" and hardware.visible_gpus() else "cpu")
    elif config.kv_archive_place != DEVICE:
        hint = "give --kv-archive a format, such as int4"
        raise UsageError(f"kv_archive_place is {config.kv_archive_place}, and nothing is archived", hint=hint)
    if config.kv_probe == INSTRUCTIONS:
        _ = Instructions.from_config(prompt).question


def use_all_cores(processes: int = 1) -> None:
    """Let torch compute on every core that this process may use, unless the environment says how many.

    Args:
        processes: how many share them.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, hardware.usable_cores() // processes))


def check_memory(config: EngineConfig, preview: Callable[[str], ModelSpec]) -> None:
    """Refuse, before weights are loaded, a model of which not one short sequence would fit, if its sizes are known.

    Args:
        config: the settings.
        preview: the sizes that the model would have on a kind of device (``cpu`` or ``cuda``).

    Raises:
        MemoryLimitError: says what would be enough.
        ModelError: bmx cannot run the model.
        UsageError: it cannot be split over as many devices.
    """
    kind = choose_device(config).type
    if kind == "cuda":
        gpus = hardware.visible_gpus()
        memory, held, runtime = gpus[0].free_memory if gpus else None, 0, RUNTIME_BYTES[kind]
    else:
        memory = hardware.free_host_memory().divided(config.tensor_parallel_size)
        held, runtime = hardware.held_bytes(), hardware.resident_bytes()
    try:
        spec = under_settings(preview(kind), config)
    except PreviewError:
        return  # the plan of the loaded model says it
    if memory is None:
        return  # what is free is known when CUDA has begun
    policy = CompressionPolicy.from_config(config, spec)
    shortest = Length.of(policy, 1, 1)
    builder = PlanBuilder(
        config=config,
        spec=spec,
        policy=policy,
        device=Device.of(kind, spec, runtime, config),
        kernels=choose(kind),
        limits=limits(config, memory, held),
    )
    builder.plan([shortest], builder.step_sizes([shortest])[-1:])
