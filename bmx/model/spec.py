"""What a model is to bmx: its attention layers as they really are, found by watching one tiny forward.

Knows how to read a loaded model and when to refuse it; knows nothing of caches, plans or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bmx.errors import ModelError, UsageError

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
class Costs:
    """What one packed token costs a model beside attention and the output head.

    Attributes:
        activation_bytes: live between operations, at the widest moment of a step.
        traffic_bytes: read and written by operations other than products.
        flops: of products.
        operators: started in a step, however many tokens it has.
    """

    activation_bytes: int
    traffic_bytes: int
    flops: int
    operators: int

    def scaled(self, factor: float) -> Costs:
        """The same in a type whose numbers are ``factor`` times as large."""
        activations, traffic = round(factor * self.activation_bytes), round(factor * self.traffic_bytes)
        return replace(self, activation_bytes=activations, traffic_bytes=traffic)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a model: what memory and the planner need to know.

    ``weight_bytes`` counts tied tensors once; ``itemsize`` is the bytes of an activation; ``head_bytes`` those of
    the output head, which is read for sampled tokens only; ``merged_bytes`` those of experts, which loading copies
    together. ``int8`` says that linear layers work in bytes.
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
    int8: bool = False

    def last_reader(self, owner: int) -> int:
        """The last layer that reads this owner's keys."""
        return max(i for i, layer in enumerate(self.layers) if layer.owner == owner)


def share_layers(spec: ModelSpec, pairs: str | None) -> ModelSpec:
    """A spec in which some layers read the keys and values of earlier ones (KVSharer, arXiv 2410.18517, section 3).

    Args:
        pairs: reader and owner, as in ``7:3,12:5``.

    Raises:
        UsageError: there is no such layer, or the two differ in sizes or window.
    """
    layers = list(spec.layers)
    for pair in pairs.split(",") if pairs else ():
        reader, owner = map(int, pair.split(":"))
        if reader >= len(layers):
            raise UsageError(f"kv_share_layers names layer {reader}; {spec.name} has {len(layers)}, from 0 on")
        new = replace(layers[reader], owner=layers[owner].owner)
        if new != replace(layers[owner], query_heads=new.query_heads):
            raise UsageError(f"kv_share_layers: layers {reader} and {owner} of {spec.name} have different caches")
        if any(layer.owner == reader for layer in layers[reader + 1 :]):
            raise UsageError(f"kv_share_layers: other layers read those of layer {reader} already")
        layers[reader] = new
    return replace(spec, layers=tuple(layers))


def check_config(config: Any) -> None:
    """Refuse, from its config alone, what packed tokens would compute wrongly.

    Raises:
        ModelError: names the architecture and the reason.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    kinds -= KNOWN_LAYER_TYPES
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    elif getattr(text, "attn_temperature_tuning", None) or kinds & {"chunked_attention"}:
        reason = "its attention (chunked, or with a temperature by position) is computed outside the attention function"
    elif kinds or getattr(text, "ssm_cfg", None):
        reason = f"it has layers that keep a state of their own ({', '.join(sorted(kinds)) or 'state-space layers'})"
    else:
        return
    raise _refusal(name, reason)


@contextmanager
def use_attention(model: Any, function: Callable[..., Any], mask: Callable[..., Any] | None = None) -> Iterator[None]:
    """Make ``function`` the attention of this one model, for as long as the body runs.

    Without a mask function of the same name, transformers builds no mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name, before = f"bmx_{next(_names)}", model.config._attn_implementation
    AttentionInterface.register(name, function)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def read_spec(model: Any, costs: Callable[[Any], Costs]) -> ModelSpec:
    """Look at a loaded model's attention through forwards of three tokens, and check that it can be served.

    What a model computes for a token may depend only on the token, its position and what the attention function
    returns. The same token among others, and at another place of the pack, must give the same numbers; so a model
    that mixes tokens elsewhere (a convolution, a recurrent state) or counts positions itself is refused.

    Args:
        costs: finds what a token costs a model that is not refused.

    Raises:
        ModelError: the attention function is never called, sees the future, or is not all that mixes tokens. Of a
            model on the meta device, the last cannot be seen.
    """
    watch = _Watch(model.device)
    with use_attention(model, watch, watch.note):
        try:
            first = _numbers(model, watch, tokens=(1, 2, 3), positions=(3, 7, 1))
            other = _numbers(model, watch, tokens=(5, 2, 4), positions=(4, 7, 9))
            swapped = _numbers(model, watch, tokens=(2, 1, 3), positions=(7, 3, 1))
        except ModelError as error:
            raise _refusal(type(model).__name__, error.message) from None
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise _refusal(type(model).__name__, f"it fails on packed tokens: {reason}") from error
    if not watch.layers:
        raise _refusal(type(model).__name__, "its layers do not call transformers' attention function")
    if model.device.type != "meta":
        _check_numbers(model, first, other, swapped)
    return _spec(model, tuple(watch.layers), costs(model))


def _check_numbers(model: Any, first: Tensor, other: Tensor, swapped: Tensor) -> None:
    """Refuse a model that computes no numbers, or others for the same token elsewhere."""
    if not first.isfinite().all():
        raise _refusal(type(model).__name__, "what it computes is not a number: its weights are broken")
    tolerance = 1e-3 if model.dtype.itemsize >= 4 else 2e-2
    if not (_close(first[1], other[1], tolerance) and _close(first[1], swapped[0], tolerance)):
        reason = "tokens would mix outside its attention, or it gives them positions of its own"
        raise _refusal(type(model).__name__, reason)


class _Watch:
    """An attention function that writes down what it is called with, and lets no token see another.

    As a mask function it hands out empty notes in place of masks. A layer that is called with a note shows so how
    transformers would have masked it; with anything else, that the model makes masks of its own.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self.layers: list[LayerSpec] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._notes: list[tuple[Tensor, int | None]] = []

    def forget(self) -> None:
        """Begin another forward."""
        self.layers, self.calls, self._notes = [], [], []

    def note(self, *_: Any, local_size: int | None = None, **__: Any) -> Tensor:
        """In place of a mask; ``local_size`` is the sliding window that the mask would have had."""
        import torch

        note = torch.empty(1, 1, 1, 1, device=self._device)
        self._notes.append((note, local_size))
        return note

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("position_bias") is not None:
            raise ModelError("it gives its attention a bias of its own")
        if getattr(module, "is_causal", True) is False:
            raise ModelError("its attention is not causal: a token sees what comes after it")
        if not query.dtype == key.dtype == value.dtype:
            raise ModelError(f"its queries, keys and values differ in type ({query.dtype}, {key.dtype}, {value.dtype})")
        owner = next((i for i, (_, k, v) in enumerate(self.calls) if k is key and v is value), len(self.calls))
        window = self._window(attention_mask, kwargs.get("sliding_window"))
        if owner < len(self.layers) and self.layers[owner].window != window:
            raise ModelError("layers that share keys see different windows of them")
        self.calls.append((query, key, value))
        self.layers.append(
            LayerSpec(
                query_heads=query.shape[1],
                kv_heads=key.shape[1],
                key_dim=key.shape[-1],
                value_dim=value.shape[-1],
                window=window,
                owner=owner,
            )
        )
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous(), None

    def _window(self, mask: Any, told: int | None) -> int | None:
        """The window that the mask would have; where no mask was asked for, the one that the layer tells."""
        if mask is None:
            return told or None
        for note, window in self._notes:
            if mask is note:
                return window or None
        raise ModelError("it gives its attention a mask or bias of its own")


def _numbers(model: Any, watch: _Watch, tokens: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
    """All that is computed for each of the first two of three packed tokens: queries, keys, values, logits [2, F]."""
    import torch

    watch.forget()
    # Told that all tokens count, transformers does not look for the borders of sequences in the positions' values.
    told = {"attention_mask": torch.ones(1, len(tokens), device="meta")} if model.device.type == "meta" else {}
    with torch.inference_mode():
        output = model(
            **told,
            input_ids=torch.tensor([tokens], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            past_key_values=None,
            use_cache=False,
            logits_to_keep=torch.arange(2, device=model.device),
        )
    if output.logits.shape[1] != 2:
        raise ModelError("it computes logits for every token, asked for or not")
    parts = [t[0, :, :2].transpose(0, 1).flatten(1) for call in watch.calls for t in call]
    return torch.cat([*parts, output.logits[0]], dim=1).float()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * a.norm() + 1e-6)


def held_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers, tied ones counted once."""
    return sum({id(t): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}.values())


def _spec(model: Any, layers: tuple[LayerSpec, ...], costs: Costs) -> ModelSpec:
    head = model.get_output_embeddings().weight
    return ModelSpec(
        name=type(model).__name__,
        layers=layers,
        costs=costs,
        vocab=head.shape[0],
        max_length=_max_length(model.config.get_text_config(decoder=True)),
        weight_bytes=held_bytes(model),
        head_bytes=head.nbytes,
        itemsize=model.dtype.itemsize,
        merged_bytes=sum(p.nbytes for p in model.parameters() if p.dim() == 3),
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
