"""What a packed token costs a model, measured by running it on meta tensors, which have shapes but no contents.

Knows torch's operators and how long tensors live; knows nothing of particular architectures. For common ones, the
closed formulas of ``config_spec`` give the same numbers without torch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bmx.kernels import mixer_shapes
from bmx.kernels.segments import NO_SEGMENTS
from bmx.model.asked_logits import compute_asked_logits
from bmx.model.mixers import Mixers
from bmx.model.rope import pin_rope
from bmx.model.spec import Costs, no_attention, no_padding, no_preview, use_attention
from bmx.model.split_modules import devices_of, split

FEW, MANY = 64, 128  # tokens of the two runs; costs that do not grow with the tokens cancel out


def trace_costs(model: Any) -> Costs:
    """The costs of a packed token, without attention and without the functions in which mixers mix tokens.

    Args:
        model: a transformers model, best on the meta device.
    """
    mixers = Mixers(model, mixer_shapes)
    with mixers.attached(), mixers.finding(1, model.device):
        _CostMeter(model).run(1)  # frequency tables are computed once and kept: no cost of a step
    few, many = _CostMeter(model), _CostMeter(model)
    with mixers.attached():
        for meter, tokens in ((few, FEW), (many, MANY)):
            with mixers.step(NO_SEGMENTS, [torch.empty(0)] * len(mixers.layouts)):
                meter.run(tokens)
    tokens = MANY - FEW
    return Costs(
        activation_bytes=round((many.peak - few.peak) / tokens),
        traffic_bytes=round((many.traffic - few.traffic) / tokens),
        flops=round((many.flops - few.flops) / tokens),
        operators=many.operators,
    )


def token_costs(model: Any) -> Costs:
    """The costs of a packed token, traced on a copy of the model without contents where that runs.

    Raises:
        PreviewError: the model is on the meta device and its code reads the values of tensors.
    """
    for dtype in dict.fromkeys((model.dtype, torch.bfloat16)):  # on the meta device, experts take bfloat16 alone
        with suppress(RuntimeError, NotImplementedError):
            return trace_costs(meta_copy(model, dtype)).scaled(model.dtype.itemsize / dtype.itemsize)
    if model.device.type == "meta":
        raise no_preview(model)
    return trace_costs(model)


def meta_copy(model: Any, dtype: Any) -> Any:
    """A model of the same class and sizes on the meta device, in torch's type ``dtype``."""
    with torch.device("meta"):
        copy = type(model)._from_config(model.config, dtype=dtype).eval()
    if devices_of(model) > 1:
        split(copy, devices_of(model))
    compute_asked_logits(copy)
    pin_rope(copy)
    return copy


class _CostMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while active, live bytes that operators made, the bytes they touched, and the FLOPs of products."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._holders: Counter[int] = Counter()  # tensors by the storage they share
        self._live = self.peak = self.traffic = self.flops = self.operators = 0

    def run(self, tokens: int) -> None:
        """Measure a step of ``tokens`` tokens."""
        device = self._model.device
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        mask = no_padding(self._model, tokens)
        with use_attention(self._model, no_attention, _no_mask), torch.no_grad(), self:
            self._model(
                input_ids=ids,
                position_ids=ids,
                attention_mask=mask,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=torch.zeros(0, dtype=torch.long, device=device),
            )

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count what it made and touched."""
        output = operator(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.dim() == 2 and t.device != self._model.device for t in inputs):
            return output  # it looks at the mask, which a step does not have
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        for tensor in outputs:
            if not operator.is_view or self._holders[tensor.untyped_storage()._cdata]:  # views of weights do not count
                self._hold(tensor)
        flops = _flops(operator, args, kwargs or {}, output)
        self.operators += not operator.is_view
        if flops:
            self.flops += flops
        elif not operator.is_view:
            self.traffic += sum(_bytes(t) for t in (*inputs, *outputs))
        return output

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage as live until the last tensor that shares it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not self._holders[key]:
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= size


def _flops(operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    """FLOPs of a product; 0 for any other operator."""
    if "grouped_mm" in operator.__name__:  # tokens sorted by expert [M, K] x weights of all experts [X, K, N]
        return 2 * int(output.numel()) * int(args[0].shape[-1])
    counter = flop_registry.get(operator._overloadpacket)
    return int(counter(*args, **kwargs, out_val=output)) if counter else 0


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that an operator touches: of a broadcast tensor, those that are stored."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask."""
