"""Weights of linear layers of the same input, laid one after another, so that a GPU multiplies them in one product.

The layers keep their weights, as views: no byte is held twice, and whoever reads or saves the model sees what was there
before. Knows torch's modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bmx.model.fp8_modules import Fp8Linear

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.inference_mode(mode=False)
@torch.no_grad()
def join_weights(model: Any) -> None:
    """Lay the weights of layers of the same input one after another, where nothing else holds them.

    Args:
        model: on one device. Layers that are elsewhere, that share a tensor with others, or of which some have a bias
            and others none, stay as they are.
    """
    own = (chain(m.parameters(recurse=False), m.buffers(recurse=False)) for m in model.modules())
    holders = Counter(tensor.data_ptr() for tensors in own for tensor in tensors)
    for module in model.modules():
        for names in SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            if len({type(layer) for layer in layers}) == 1 and type(layers[0]) in (nn.Linear, Fp8Linear):
                tensors = [_tensors(layer) for layer in layers]
                columns = list(zip(*tensors, strict=False))
                alike = len({len(each) for each in tensors}) == 1  # all have a bias, or none
                if alike and all(_free(column, holders, model.device) for column in columns):
                    for column in columns:
                        _join(column)


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors of a layer, whose rows are its outputs."""
    own = (layer.codes, layer.scales, layer.bias) if isinstance(layer, Fp8Linear) else (layer.weight, layer.bias)
    return [tensor for tensor in own if tensor is not None]


def _free(column: Sequence[Tensor], holders: Counter[int], device: torch.device) -> bool:
    """Whether the same tensor of several layers can be laid together: each has its memory to itself."""
    return len({(t.dtype, t.shape[1:]) for t in column}) == 1 and all(
        t.device == device
        and t.is_contiguous()
        and holders[t.data_ptr()] == 1
        and t.untyped_storage().nbytes() == t.nbytes
        for t in column
    )


def _join(tensors: Sequence[Tensor]) -> None:
    """Make tensors views of one; what they held is given back at once, since the next one needs a larger block."""
    parts: Sequence[Tensor] = torch.split(torch.cat(list(tensors)), [len(tensor) for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
    if tensors[0].is_cuda:
        torch.cuda.empty_cache()
