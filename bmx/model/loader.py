"""Loads a model for packed tokens from a folder or by its hub id.

Knows transformers' loading; knows nothing of KV caches, plans or requests.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmx import hardware
from bmx.config import EngineConfig
from bmx.errors import MemoryLimitError, ModelError, UsageError
from bmx.kernels import choose, fp8, int8
from bmx.model.end_tokens import end_tokens
from bmx.model.folders import refuse_no_weights, tokenizer_problem
from bmx.model.hub import cached_commit, cached_folder
from bmx.model.inspection import held_bytes, read_spec
from bmx.model.load_problems import cause_and_hint, download_again
from bmx.model.number_type import dtype_name, slow_on_cpu
from bmx.model.quantized_forms import (
    ask_for_whole,
    check_unpacked,
    convert_unpacked,
    not_split,
    refuse_packed,
    refuse_unknown_form,
    stated_method,
    whole_in_memory,
)
from bmx.model.source_files import read_object
from bmx.model.spec import ModelSpec, check_config
from bmx.model.text_side import find_text_side

if TYPE_CHECKING:
    from bmx.model.rope import SequenceRope

logger = logging.getLogger(__name__)

COPY = "copy the tokenizer's files from the model that it was made from"
PAGE = 4096  # bytes
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")  # their chat template goes before the tokenizer's
RUNTIME_BYTES = {"cpu": 292 * 10**6, "cuda": 750 * 10**6}  # of libraries and a CUDA context, if they are not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready for packed tokens.

    Attributes:
        model: the transformers model, in eval mode on its device.
        spec: its sizes.
        end_token_ids: tokens that end an answer.
        rope: its rotary embedding, if that depends on the length of a sequence.
        runtime_bytes: host memory of the process before the model was loaded, or GPU memory of the CUDA context.
        commit: of a hub model; None for files of this machine.
    """

    model: Any
    spec: ModelSpec
    end_token_ids: frozenset[int]
    rope: SequenceRope | None
    runtime_bytes: int
    commit: str | None = None


def load_tokenizer(source: str, config: EngineConfig, gguf: str | None = None) -> Any:
    """The tokenizer of a model.

    Args:
        source: folder or hub id.
        config: says how to load it.
        gguf: name of the GGUF file in the folder ``source`` that holds the tokenizer; None if it has its own files.

    Raises:
        ModelError: the tokenizer cannot be found or read.
    """
    from transformers import AutoTokenizer

    silence_transformers()
    with loading_errors(config.model):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                **({"gguf_file": gguf} if gguf else {}),
            )
        except ValueError as error:
            if "backend tokenizer" not in str(error) or not Path(source).is_dir():
                raise
            raise ModelError(
                f"cannot load model {config.model}: {tokenizer_problem(Path(source))}", hint=COPY
            ) from None
        for file in () if gguf else PROCESSOR_FILES:
            found = read_object(source, file, config, "the tokenizer's own chat template is used")
            if found.get("chat_template"):
                tokenizer.chat_template = found["chat_template"]
    return tokenizer


def load_model(source: str, config: EngineConfig, tokenizer: Any = None) -> LoadedModel:
    """Load a model to its device and inspect it.

    Args:
        source: folder or hub id.
        config: says how to load it.
        tokenizer: the model's tokenizer, which knows how a turn ends; without one, the model's config alone decides.

    Raises:
        MemoryLimitError: the device has no room for it.
        ModelError: the model cannot be found or read, or bmx cannot run it correctly.
        UsageError: as ``check_quantization``.
    """
    from transformers import AutoConfig

    silence_transformers()
    device = choose_device(config)
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with loading_errors(config.model):
        model_config = AutoConfig.from_pretrained(source, **where)
    check_config(model_config)
    keys = model_config.to_dict()
    refuse_unknown_form(config.model, keys)
    if Path(source).is_dir():
        refuse_no_weights(Path(source), config.model)
        refuse_packed(config.model, Path(source), keys)
    ends = end_tokens(source, config, model_config, tokenizer) if tokenizer else None
    _compare_vocabularies(tokenizer, model_config, config.model)
    with loading_errors(config.model):
        text_side = find_text_side(model_config, config.trust_remote_code)  # imports its code, which counts as runtime
    dtype = choose_dtype(config, device, keys)
    check_quantization(config.quantization, str(dtype).removeprefix("torch."), device.type)
    packed, devices = stated_method(keys) is not None, config.tensor_parallel_size
    if packed and devices > 1:
        raise not_split(config.model)
    if whole_in_memory(keys, device.type):
        ask_for_whole(model_config)
    hardware.trim_heap()
    runtime = hardware.resident_bytes() if device.type == "cpu" else _context_bytes(device)
    with loading_errors(config.model):
        model, loading = text_side.load(
            source,
            dtype=dtype,
            device_map=None if device.type == "cpu" or devices > 1 else device,
            use_safetensors=True,
            ignore_mismatched_sizes=not packed,  # those are refused below, by name
            **where,
            **_over(devices),
        )
    check_complete(config.model, loading)
    check_unpacked(config.model, model, loading["unexpected_keys"])
    if folder := cached_folder(source, config.revision):
        refuse_packed(config.model, folder, keys)
    if packed:
        convert_unpacked(model, dtype)
    if devices > 1:
        model = _part(model, devices)
    if device.type == "cpu":
        _read_pages(model)
    loaded = replace(prepare(model.eval(), runtime), commit=cached_commit(source, config.revision))
    loaded = loaded if ends is None else replace(loaded, end_token_ids=ends)
    return loaded if config.quantization == "none" else quantize(loaded, config.quantization)


def _over(devices: int) -> dict[str, Any]:
    """How transformers loads a model over devices: each process reads its own part."""
    if devices == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=devices)}


def _part(model: Any, devices: int) -> Any:
    """The part of a model that this process has loaded of it, as a model."""
    from torch.distributed import get_rank

    from bmx.model.split_modules import split

    return split(model, devices, get_rank())


def _compare_vocabularies(tokenizer: Any, model_config: Any, name: str) -> None:
    """Warn of a tokenizer that has more tokens than its model: rows with one of those will fail."""
    vocab = getattr(model_config.get_text_config(decoder=True), "vocab_size", None) or 2**31
    try:
        last = max(tokenizer.get_vocab().values(), default=0) if tokenizer else 0
    except (AttributeError, NotImplementedError):  # a tokenizer with code of its own that lists no tokens
        return
    if last >= vocab:
        text = "the tokenizer of model %s has tokens up to %d, and the model only up to %d; rows with others fail"
        logger.warning(text, name, last, vocab - 1)


def quantize(loaded: LoadedModel, how: str) -> LoadedModel:
    """The same model with int8 or float8 weights in its linear layers.

    Args:
        loaded: the model.
        how: ``int8`` or ``fp8``.

    Raises:
        ModelError: the model has no linear layers, or only such as stay as they are.
        UsageError: as ``check_quantization``.
    """
    from bmx.kernels.fp8_products import failure
    from bmx.model import fp8_modules, int8_modules

    model, on_cpu = loaded.model, loaded.model.device.type == "cpu"
    check_quantization(how, str(model.dtype).removeprefix("torch."), model.device.type)
    if how == "fp8" and (reason := failure(model.device)):
        raise UsageError(f"--quantization fp8 does not work here: {reason}", hint="leave it out")
    count = int8_modules.quantise(model, choose("cpu")) if how == "int8" else fp8_modules.quantise(model)
    if not count:
        reason = f"{loaded.spec.name} has no linear layers that would be faster in {how}"
        raise ModelError(reason, hint="leave out --quantization")
    for parameter in model.parameters() if on_cpu else ():  # a view of the mapped file would keep all of it in memory
        parameter.data = parameter.data.clone()
    hardware.trim_heap()  # of the weights that were there before
    if not on_cpu:
        import torch

        torch.cuda.empty_cache()
    return replace(loaded, spec=replace(loaded.spec, weight_bytes=held_bytes(model), quantization=how))


def check_quantization(how: str, dtype: str, device: str) -> None:
    """Refuse quantised weights where they would be slower than the model's own.

    Args:
        how: ``none``, ``int8`` or ``fp8``.
        dtype: torch's name of the model's type.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: they would be slower, or the device has none.
    """
    if how == "none":
        return
    if how == "fp8":
        _check_fp8(dtype, device)
        return
    if device != "cpu":
        raise UsageError("--quantization int8 works on CPUs only", hint="here, fp8 may be faster; or add --device cpu")
    kernels = choose("cpu")
    if reason := int8.why_refused(kernels.capabilities, dtype):
        message = f"--quantization int8 would make this run slower: {reason}; kernels: {kernels.why}"
        raise UsageError(message, hint="leave it out")


def _check_fp8(dtype: str, device: str) -> None:
    """The part of ``check_quantization`` about float8 weights.

    Raises:
        UsageError: the device has none.
    """
    if device != "cuda":
        raise UsageError("--quantization fp8 works on GPUs only", hint="leave it out; on CPUs, int8 may be faster")
    if reason := fp8.why_refused(dtype):
        other_type = dtype != fp8.DTYPE
        hint = f"add --dtype {fp8.DTYPE}, or leave it out" if other_type else "leave it out"
        raise UsageError(f"--quantization fp8 does not work here: {reason}", hint=hint)


def _read_pages(model: Any) -> None:
    """Read an element of every page of the weights, so that weights mapped from a file are in memory when measured."""
    import torch

    for parameter in model.parameters():
        elements = parameter.detach().flatten()[:: PAGE // parameter.element_size()]
        _ = (elements.view(torch.uint8) if elements.element_size() == 1 else elements).sum()  # float8 has no sum


def _context_bytes(device: Any) -> int:
    """GPU memory that the CUDA context of this process takes: the free memory that disappears when CUDA starts."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return RUNTIME_BYTES["cuda"]
    seen = hardware.visible_gpus()
    torch.zeros(1, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    if not seen or seen[0].mig or seen[0].free is None:
        return RUNTIME_BYTES["cuda"]
    return max(0, seen[0].free - free - torch.cuda.memory_reserved(device))


def prepare(model: Any, runtime_bytes: int = 0) -> LoadedModel:
    """Make a transformers model ready for packed tokens.

    Args:
        model: in eval mode, on its device.
        runtime_bytes: host memory of the process before the model was loaded, or GPU memory of the CUDA context.

    Raises:
        ModelError: bmx cannot run it correctly.
    """
    from bmx.model.asked_logits import compute_asked_logits
    from bmx.model.cost_trace import token_costs
    from bmx.model.rope import pin_rope

    check_config(model.config)
    model.requires_grad_(False)
    compute_asked_logits(model)
    rope = pin_rope(model)
    return LoadedModel(
        model=model,
        spec=read_spec(model, token_costs),
        end_token_ids=_end_tokens(model),
        rope=rope,
        runtime_bytes=runtime_bytes,
    )


def choose_device(config: EngineConfig) -> Any:
    """The torch device to run on.

    Raises:
        ModelError: the configuration asks for a GPU, and torch finds none.
    """
    import torch

    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ModelError("no CUDA GPU is available here", hint="leave out --device to run on the CPU")
    return torch.device("cuda", 0) if available and config.device != "cpu" else torch.device("cpu")


def choose_dtype(config: EngineConfig, device: Any, model_config: Mapping[str, Any]) -> Any:
    """The torch type to compute in; a warning says so if the configured one is slow.

    Args:
        config: the settings.
        device: torch's device.
        model_config: the keys of the model's config.
    """
    import torch

    if config.dtype == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        logger.warning("the model is computed in float16: GPUs of a compute capability below 8.0 have no bfloat16")
        return torch.float16
    dtype = dtype_name(config, device.type, model_config)
    if config.dtype != "auto" and device.type == "cpu" and (reason := slow_on_cpu(dtype, model_config)):
        logger.warning("--dtype %s is slow here: %s; float32 is faster", dtype, reason)
    return getattr(torch, dtype)


def _end_tokens(model: Any) -> frozenset[int]:
    """Token ids that end an answer: the generation config's, else the model config's."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None) if ids is None else ids
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def check_complete(name: str, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint with missing tensors or ones of other shapes: transformers fills those with random numbers.

    Raises:
        ModelError: tensors are missing or have other shapes; it names the first ones.
    """
    if differing := sorted(loading["mismatched_keys"]):
        tensor, stored, expected = differing[0]
        shapes = f"{tensor} is {list(stored)}, and its config.json asks for {list(expected)}"
        more = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
        message = f"cannot load model {name}: its weights have other shapes than its config says: {shapes}{more}"
        raise ModelError(message, hint=download_again(name))
    missing = sorted(loading["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"model {name} is incomplete: {len(missing)} tensors are missing ({shown})", hint=download_again(name)
        )


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn whatever loading the model ``name`` raises into one ModelError with the cause in a line.

    Raises:
        MemoryLimitError: the device has no room for the model.
        ModelError: anything else went wrong. Whatever a file's reader raises is the file's fault; Ctrl-C is not.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryLimitError(f"model {name} does not fit on the device", hint="choose a smaller one") from error
        if isinstance(error, MemoryError):  # the system refuses more
            raise MemoryLimitError(f"there is no memory to load model {name}", hint="see `ulimit -v`") from error
        cause, hint = cause_and_hint(name, error)
        raise ModelError(f"cannot load model {name}: {cause}", hint=hint) from error


def check_libraries() -> None:
    """Import transformers, and with it torch.

    Raises:
        ModelError: they are missing, broken, or do not go together.
    """
    try:
        import transformers  # noqa: F401
    except Exception as error:  # whatever their files raise when they are loaded
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "install bmx again, in an environment of its own"
        raise ModelError(f"transformers cannot be loaded: {lines[0]}", hint=hint) from error


def silence_transformers() -> None:
    """Turn off transformers' progress bars and advice: bmx shows its own. Downloads keep their bars."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    with warnings.catch_warnings(action="ignore"):  # a variable of the user's that says otherwise wins
        transformers_logging.disable_progress_bar()  # those of downloads too
        enable_progress_bars()
    transformers_logging.set_verbosity_error()
