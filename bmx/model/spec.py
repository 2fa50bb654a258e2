"""What a model is to bmx: its attention layers as they really are, found by watching one tiny forward.

Knows how to read a loaded model and when to refuse it; knows nothing of caches, plans or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmx.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_names = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One call of the attention function, in the order of the calls.

    ``window`` is the number of newest keys that a query sees (itself among them), or None for all. ``owner`` is
    the layer whose keys this one reads: itself, but for layers that share.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    owner: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a model: what memory and the planner need to know.

    ``weight_bytes`` counts tied tensors once; ``itemsize`` is the bytes of an activation.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    hidden: int
    intermediate: int
    vocab: int
    max_length: int
    weight_bytes: int
    itemsize: int

    def last_reader(self, owner: int) -> int:
        """The last layer that reads this owner's keys."""
        return max(i for i, layer in enumerate(self.layers) if layer.owner == owner)


def check_config(config: Any) -> None:
    """Refuse, from its config alone, what packed tokens would compute wrongly.

    Raises:
        ModelError: names the architecture and the reason.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    elif getattr(text, "attn_temperature_tuning", None) or kinds & {"chunked_attention"}:
        reason = "its attention (chunked, or with a temperature by position) is computed outside the attention function"
    elif kinds or getattr(text, "layers_block_type", None) or getattr(text, "ssm_cfg", None):
        reason = f"it has layers that keep a state of their own ({', '.join(sorted(kinds)) or 'state-space layers'})"
    else:
        return
    raise _refusal(name, reason)


@contextmanager
def attention_of(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Make ``function`` the attention of this one model, for as long as the body runs.

    No mask function goes with it, so transformers builds no mask.
    """
    from transformers import AttentionInterface

    name, before = f"bmx_{next(_names)}", model.config._attn_implementation
    AttentionInterface.register(name, function)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)


def read_spec(model: Any) -> ModelSpec:
    """Look at a loaded model's attention through one forward of three tokens, and check that it can be served.

    A token's output may depend only on the token, its position and what the attention function returns; two more
    forwards see to that, so that a model that mixes tokens elsewhere (a convolution, a recurrent state) is
    refused rather than run wrong.

    Raises:
        ModelError: the attention function is never called, or the model mixes packed tokens by other ways.
    """
    watch = _Watch()
    with attention_of(model, watch):
        try:
            first = _logits(model, watch, tokens=(1, 2, 3), positions=(3, 7, 1))
            other = _logits(model, watch, tokens=(5, 2, 4), positions=(4, 7, 9))
            swapped = _logits(model, watch, tokens=(2, 1, 3), positions=(7, 3, 1))
        except ModelError as error:
            raise _refusal(type(model).__name__, error.message) from None
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _refusal(type(model).__name__, f"it fails on packed tokens: {error}") from error
    if not watch.layers:
        raise _refusal(type(model).__name__, "its layers do not call transformers' attention function")
    if not (_close(first[1], other[1]) and _close(first[1], swapped[0])):
        raise _refusal(type(model).__name__, "tokens of different sequences would mix outside its attention")
    return _spec(model, tuple(watch.layers))


class _Watch:
    """An attention function that writes down the shapes it is called with, and lets no token see another."""

    def __init__(self) -> None:
        self.layers: list[LayerSpec] = []
        self.keys: list[Tensor] = []

    def __call__(
        self, _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None or kwargs.get("position_bias") is not None:
            raise ModelError("it gives its attention a mask or bias of its own")
        owner = next((i for i, seen in enumerate(self.keys) if seen is key), len(self.keys))
        self.keys.append(key)
        self.layers.append(
            LayerSpec(
                query_heads=query.shape[1],
                kv_heads=key.shape[1],
                key_dim=key.shape[-1],
                value_dim=value.shape[-1],
                window=kwargs.get("sliding_window"),
                owner=owner,
            )
        )
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous(), None


def _logits(model: Any, watch: _Watch, tokens: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
    """Logits [2, V] of the first two of three packed tokens, none of which sees another."""
    import torch

    watch.layers.clear()
    watch.keys.clear()
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([tokens], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            past_key_values=None,
            use_cache=False,
            logits_to_keep=torch.arange(2, device=model.device),
        )
    logits: Tensor = output.logits[0].float()
    if len(logits) != 2:
        raise ModelError("it computes logits for every token, asked for or not")
    return logits


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 0.05 * a.norm() + 1e-6)


def _spec(model: Any, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    text = model.config.get_text_config(decoder=True)
    sizes = {t.data_ptr(): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = getattr(text, "moe_intermediate_size", None) or 0
    active = getattr(text, "num_experts_per_tok", None) or 0
    widest = inner if isinstance(inner, int) else max(inner)
    return ModelSpec(
        name=type(model).__name__,
        layers=layers,
        hidden=hidden,
        intermediate=max(widest, int(experts) * int(active)),
        vocab=model.get_output_embeddings().weight.shape[0],
        max_length=_max_length(text),
        weight_bytes=sum(sizes.values()),
        itemsize=model.dtype.itemsize,
    )


def _max_length(text: Any) -> int:
    """Positions that the model can tell apart; dynamic NTK stretches those it was trained on."""
    trained = int(getattr(text, "max_position_embeddings", None) or 2**31)
    rope = getattr(text, "rope_parameters", None) or {}
    return int(trained * rope["factor"]) if rope.get("rope_type") == "dynamic" else trained


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(
        f"bmx cannot run {name}: {reason}",
        hint="decoders with plain, sliding-window or shared attention work: Llama, Qwen, Gemma, Phi, Mistral and more",
    )
