"""Inspection of a loaded model: its attention layers and states, found by watching small forwards, and its sizes.

Knows when a model cannot be run as it is; knows nothing of caches, plans or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bmx.errors import ModelError
from bmx.model.spec import SPARSE, Costs, LayerSpec, ModelSpec, no_padding, no_preview, refusal, use_attention

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kernels.mixer_contract import MixerFunctions
    from bmx.model.mixers import Mixers

# Keywords of an attention function: those that bmx heeds, and those that change nothing in packed tokens
HEEDED_KEYWORDS = {"scaling", "softcap", "s_aux", "sliding_window", "is_causal"}
IDLE_KEYWORDS = {"dropout", "position_ids", "cache_position", "use_cache", "deterministic", "return_dict"}
IDLE_KEYWORDS |= {"output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"}
IDLE_KEYWORDS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
SPARSE_KEYWORDS = {"indices", "block_indices"}


def read_spec(model: Any, costs: Callable[[Any], Costs]) -> ModelSpec:
    """Inspect a loaded model's attention through forwards of three tokens, and check that it can be run.

    What a model computes for a token may depend only on the token, its position and what the attention function
    returns. The same token with other neighbours, and at another place in the pack, must give the same numbers. So a
    model that mixes tokens elsewhere (a convolution, a recurrent state) or counts positions itself is refused.

    Args:
        model: a transformers model in eval mode; on the meta device, its numbers cannot be compared.
        costs: measures what a token costs the model, if it is not refused.

    Raises:
        ModelError: the attention function is never called or sees the future, or tokens mix outside it.
        PreviewError: the model fails on the meta device.
    """
    from bmx.model.mixers import Mixers

    probe = _AttentionProbe(model.device)
    with _own_kernels(model) as kernels, use_attention(model, probe, probe.placeholder_mask):
        try:
            mixers = Mixers(model, kernels)
            with mixers.attached(), mixers.watched() as seen:
                first = _outputs(model, probe, mixers, tokens=(1, 2, 3), positions=(3, 7, 1))
                neighbours = _outputs(model, probe, mixers, tokens=(5, 2, 4), positions=(4, 7, 9))
                swapped = _outputs(model, probe, mixers, tokens=(2, 1, 3), positions=(7, 3, 1))
            if model.device.type != "meta":
                mixers.check(seen)
        except ModelError as error:
            raise refusal(type(model).__name__, error.message) from None
        except Exception as error:
            if model.device.type == "meta":
                raise no_preview(model) from error
            reason = (str(error).splitlines() or [""])[0]
            raise refusal(type(model).__name__, f"it fails on packed tokens: {reason}") from error
    if not probe.layers:
        raise refusal(type(model).__name__, "its layers do not call transformers' attention function")
    if model.device.type != "meta":
        _check_outputs(model, first, neighbours, swapped)
    return replace(_spec(model, tuple(probe.layers), costs(model)), states=mixers.layouts)


def call_mixers(model: Any, kernels: MixerFunctions) -> None:
    """Run a model that ``read_spec`` has read on three packed tokens, with mixers that these kernels compute."""
    from bmx.model.mixers import Mixers

    probe, mixers = _AttentionProbe(model.device), Mixers(model, kernels)
    with use_attention(model, probe, probe.placeholder_mask), mixers.attached():
        _outputs(model, probe, mixers, tokens=(1, 2, 3), positions=(3, 7, 1))


@contextmanager
def _own_kernels(model: Any) -> Iterator[MixerFunctions]:
    """On a CPU, the kernels that will run compute: torch's products of bfloat16 may take a hundred times as long.

    Yields:
        The functions that compute what mixers do: on a GPU in plain torch, on the meta device nothing.
    """
    from bmx.kernels import choose, mixer_shapes, reference
    from bmx.model.fused_modules import fused_modules

    if model.device.type != "cpu":
        yield mixer_shapes if model.device.type == "meta" else reference
        return
    kernels = choose("cpu")
    with fused_modules(model, kernels):
        yield kernels.module


def _check_outputs(model: Any, first: Tensor, neighbours: Tensor, swapped: Tensor) -> None:
    """Refuse a model whose outputs are not finite, or depend on more than a token and its position.

    Args:
        model: that computed the outputs.
        first: [2, F] outputs of tokens 1 and 2.
        neighbours: [2, F] the second row is of the same token at the same position, with other neighbours.
        swapped: [2, F] the rows of ``first`` in the other order, computed from tokens in the other order.
    """
    if not first.isfinite().all():
        raise refusal(type(model).__name__, "it computes NaN or infinity: its weights are broken")
    tolerance = 1e-3 if model.dtype.itemsize >= 4 else 2e-2
    if not (_close(first[1], neighbours[1], tolerance) and _close(first[1], swapped[0], tolerance)):
        reason = "tokens would mix outside its attention, or it gives them positions of its own"
        raise refusal(type(model).__name__, reason)


class _AttentionProbe:
    """An attention function that records its calls, and lets no token see another.

    As a mask function it returns placeholders. The placeholder that a layer is called with tells which window
    transformers would have masked; a layer called with any other mask belongs to a model that makes its own.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self.layers: list[LayerSpec] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._masks: list[tuple[Tensor, int | None]] = []

    def reset(self) -> None:
        """Forget the calls of the last forward."""
        self.layers, self.calls, self._masks = [], [], []

    def placeholder_mask(self, *_: Any, local_size: int | None = None, **__: Any) -> Tensor:
        """A tensor in place of a mask; ``local_size`` is the sliding window of the mask."""
        import torch

        mask = torch.empty(1, 1, 1, 1, device=self._device)
        self._masks.append((mask, local_size))
        return mask

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        _check_keywords({name for name, value in kwargs.items() if value is not None})
        if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
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

    def _window(self, mask: Any, sliding_window: int | None) -> int | None:
        """The window of a layer: that of its placeholder; without a mask, the layer's own ``sliding_window``."""
        if mask is None:
            return sliding_window or None
        for placeholder, window in self._masks:
            if mask is placeholder:
                return window or None
        raise ModelError("it gives its attention a mask or bias of its own")


def _check_keywords(given: set[str]) -> None:
    """Refuse a call of the attention function that asks for what bmx would not do.

    Args:
        given: the keywords whose value is not None.

    Raises:
        ModelError: the reason.
    """
    if "position_bias" in given:
        raise ModelError("it gives its attention a bias of its own")
    if given & SPARSE_KEYWORDS:
        raise ModelError(SPARSE)
    if unknown := sorted(given - HEEDED_KEYWORDS - IDLE_KEYWORDS):
        raise ModelError(f"it asks its attention for something that bmx does not know ({', '.join(unknown)})")


def _outputs(
    model: Any, probe: _AttentionProbe, mixers: Mixers, tokens: tuple[int, ...], positions: tuple[int, ...]
) -> Tensor:
    """Queries, keys, values and logits of the first two of three packed tokens: [2, F], one row for each token.

    Args:
        model: whose attention function is ``probe``.
        probe: records queries, keys and values.
        mixers: of the model; each token is a sequence of its own.
        tokens: three token ids.
        positions: their positions.
    """
    import torch

    probe.reset()
    mask = {"attention_mask": no_padding(model, len(tokens))} if model.device.type == "meta" else {}
    with torch.inference_mode(), mixers.finding(len(tokens), model.device):
        output = model(
            **mask,
            input_ids=torch.tensor([tokens], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            past_key_values=None,
            use_cache=False,
            logits_to_keep=torch.arange(2, device=model.device),
        )
    if output.logits.shape[1] != 2:
        raise ModelError("it computes logits for every token, not only for those that are asked for")
    parts = [t[0, :, :2].transpose(0, 1).flatten(1) for call in probe.calls for t in call]
    return torch.cat([*parts, output.logits[0]], dim=1).float()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * a.norm() + 1e-6)


def held_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers, tied tensors counted once, and of weights that a library has packed."""
    tensors = {id(t): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}
    packed = (getattr(module, "packed_bytes", 0) for module in model.modules())
    return int(sum(tensors.values()) + sum(packed))


def _spec(model: Any, layers: tuple[LayerSpec, ...], costs: Costs) -> ModelSpec:
    output = model.get_output_embeddings()
    head = output.weight
    return ModelSpec(
        name=type(model).__name__,
        layers=layers,
        costs=costs,
        vocab=getattr(output, "out_features", head.shape[0]),  # of all devices, where it is split
        max_length=_max_length(model.config.get_text_config(decoder=True)),
        weight_bytes=held_bytes(model),
        head_bytes=head.nbytes,
        itemsize=model.dtype.itemsize,
        merged_bytes=sum(p.nbytes for p in model.parameters() if p.dim() == 3),
    )


def _max_length(text: Any) -> int:
    """Positions that the model can tell apart; dynamic NTK stretches the range that it was trained on."""
    trained = int(getattr(text, "max_position_embeddings", None) or 2**31)
    rope = getattr(text, "rope_parameters", None) or {}
    return int(trained * rope["factor"]) if rope.get("rope_type") == "dynamic" else trained
