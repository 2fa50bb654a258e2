"""The spec of a model: its attention layers, the states of its other layers, its sizes and costs.

Knows what a config alone tells of a model, and when to refuse it; ``inspection`` looks at the model itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bmx.errors import ModelError, PreviewError
from bmx.kv.layout import StateLayout

if TYPE_CHECKING:
    from torch import Tensor

# Names of kinds of layers in configs: with attention, perhaps beside a state of their own; without, with a state of
# their own or none. States are looked at once the model is loaded
ATTENTION_TYPES = {"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"}
OTHER_TYPES = {"linear_attention", "conv", "mamba", "mamba2", "mlp", "moe", "dense", "sparse"}
SPARSE_LAYER_TYPES = {"indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention", "minimax_m3_sparse"}
SPARSE_LAYER_TYPES |= {"compressed_sparse_attention"}
SPARSE = "its attention is sparse: an indexer of its own selects the keys that each token sees"
_names = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One attention layer; layers are numbered in the order in which they call the attention function.

    Attributes:
        query_heads: number of query heads.
        kv_heads: number of key and value heads.
        key_dim: size of a query or key of one head.
        value_dim: size of a value of one head.
        window: number of newest keys that a query sees, its own included; None for all.
        owner: number of the layer whose keys and values this one reads; its own, unless it shares another's.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    owner: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one packed token costs a model; attention and the output head are not included.

    Attributes:
        activation_bytes: bytes alive between operations, at the widest moment of a step.
        traffic_bytes: bytes read and written by operations other than matrix products.
        flops: floating-point operations of matrix products.
        operators: operators started in a step; their number does not depend on its tokens.
    """

    activation_bytes: int
    traffic_bytes: int
    flops: int
    operators: int

    def scaled(self, factor: float) -> Costs:
        """The costs in a type whose elements have ``factor`` times as many bytes."""
        activations, traffic = round(factor * self.activation_bytes), round(factor * self.traffic_bytes)
        return replace(self, activation_bytes=activations, traffic_bytes=traffic)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a model, as memory and the planner need them.

    Attributes:
        name: the model's class in transformers.
        layers: attention layers, in the order of their calls.
        costs: what a packed token costs.
        vocab: tokens of the vocabulary.
        max_length: tokens that a sequence may have.
        weight_bytes: bytes of all weights and buffers, tied tensors counted once.
        head_bytes: bytes of the output head, which is read for sampled tokens only.
        itemsize: bytes of an activation.
        merged_bytes: bytes of experts, which loading copies into one tensor.
        quantization: how the weights of linear layers are held: ``none``, ``int8`` or ``fp8``.
        states: what layers without attention keep for each sequence, in the order of their calls.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    costs: Costs
    vocab: int
    max_length: int
    weight_bytes: int
    head_bytes: int
    itemsize: int
    merged_bytes: int = 0
    quantization: str = "none"
    states: tuple[StateLayout, ...] = ()

    @property
    def pair_bytes(self) -> int:
        """Bytes of one token's KV pairs in all layers, in the model's own type."""
        owners = [layer for i, layer in enumerate(self.layers) if layer.owner == i]
        return self.itemsize * sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in owners)

    @property
    def state_bytes(self) -> int:
        """Bytes of what layers without attention keep for a sequence."""
        return sum(state.nbytes for state in self.states)

    def last_reader(self, owner: int) -> int:
        """The number of the last layer that reads the keys and values of layer ``owner``."""
        return max(i for i, layer in enumerate(self.layers) if layer.owner == owner)


def check_config(config: Any) -> None:
    """Refuse, from its config alone, a model that would compute packed tokens wrongly.

    Raises:
        ModelError: names the architecture and the reason.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    unknown = kinds - ATTENTION_TYPES - OTHER_TYPES
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    elif getattr(text, "attn_temperature_tuning", None) or kinds & {"chunked_attention"}:
        reason = "its attention (chunked, or with a temperature by position) is computed outside the attention function"
    elif kinds & SPARSE_LAYER_TYPES:
        reason = f"{SPARSE} ({', '.join(sorted(kinds & SPARSE_LAYER_TYPES))})"
    elif unknown or getattr(text, "ssm_cfg", None):
        reason = f"it has layers of a kind that bmx does not know ({', '.join(sorted(unknown)) or 'ssm_cfg'})"
    elif kinds and kinds <= OTHER_TYPES:
        reason = "none of its layers is attention, so there is no KV cache to compress"
    else:
        return
    raise refusal(name, reason)


@contextmanager
def use_attention(model: Any, function: Callable[..., Any], mask: Callable[..., Any] | None = None) -> Iterator[None]:
    """Make ``function`` the attention of this one model while the body runs.

    Args:
        model: a transformers model.
        function: takes and returns what transformers' attention functions do.
        mask: makes the attention mask; without it, transformers makes none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name, original = f"bmx_{next(_names)}", model.config._attn_implementation
    AttentionInterface.register(name, function)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def no_attention(_: Any, query: Tensor, __: Tensor, value: Tensor, *___: Any, **____: Any) -> tuple[Tensor, None]:
    """An attention function that computes nothing: an uninitialised output of the right shape [1, N, H, E].

    N tokens, H query heads, E value dim.
    """
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


def no_padding(model: Any, tokens: int) -> Tensor:
    """The padding mask [1, N] of packed tokens: all ones.

    With it, transformers looks neither for padding in the values of ids nor for borders of sequences in positions.
    Some models look at its values: for a model on the meta device it is on the CPU.

    Args:
        model: that it is for.
        tokens: N.
    """
    import torch

    return torch.ones(1, tokens, dtype=torch.bool, device="cpu" if model.device.type == "meta" else model.device)


def no_preview(model: Any) -> PreviewError:
    """The error of a model that does not run on the meta device."""
    return PreviewError(
        f"the memory of {type(model).__name__} cannot be predicted: its code reads the values of tensors",
        hint="bmx run --dry-run loads the model and makes the plan",
    )


def refusal(name: str, reason: str) -> ModelError:
    """The error of a model that bmx cannot run."""
    return ModelError(
        f"bmx cannot run {name}: {reason}",
        hint="decoders and hybrids with plain, sliding-window or shared attention work: Llama, Qwen, Gemma and more",
    )
