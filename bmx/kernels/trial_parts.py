"""Trials of the parts of a model that kernels compute in its place: products, gates, norms, rotation, drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bmx.kernels.contract import KernelModule
from bmx.kernels.fp8_products import round_rows
from bmx.kernels.linear import Linear
from bmx.kernels.trial_inputs import Inputs

TOKENS_TO_DRAW = 5000  # of a trial's vocabulary: more than a program looks at together
FLOAT8_SIZES = (48, 128)  # outputs and inputs of a layer with float8 weights
FEW = 3  # tokens whose numbers are independent of each other


def _product(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    """A linear layer, a gated pair of them, and one with float8 weights if the model has such."""
    dim = inputs.layer.key_dim
    x = inputs.normal(FEW, dim, seed=12)
    gate, up = (Linear(weight=inputs.normal(2 * dim, dim, seed=seed) / dim**0.5, bias=None) for seed in (13, 14))
    [output], [gated] = module.product((gate,))(x), module.product((gate, up), gated=True)(x)
    if inputs.layer.float8:
        codes, scales = round_rows(inputs.normal(*FLOAT8_SIZES, seed=23))
        wide = inputs.normal(FEW, FLOAT8_SIZES[1], seed=24)
        [wide] = module.product((Linear(weight=codes, bias=None, scales=scales),))(wide)
        return {"output": output, "gated": gated, "float8": wide}
    return {"output": output, "gated": gated}


def _gate(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    gate, up = (inputs.normal(FEW, inputs.layer.key_dim, seed=seed) for seed in (15, 16))
    return {"output": module.gate(gate, up)}


def _norm(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    x, weight = inputs.normal(FEW, inputs.layer.key_dim, seed=17), inputs.normal(inputs.layer.key_dim, seed=18)
    return {"output": module.rms_norm(x, weight, 1e-5)}


def _offset_norm(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    x, weight = inputs.normal(FEW, inputs.layer.key_dim, seed=17), inputs.normal(inputs.layer.key_dim, seed=18)
    return {"output": module.offset_norm(x, weight, 1e-5)}


def _gated_norm(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    x, gate = (inputs.normal(FEW, inputs.layer.key_dim, seed=seed) for seed in (17, 19))
    return {"output": module.gated_norm(x, gate, inputs.normal(inputs.layer.key_dim, seed=18), 1e-5)}


def _rotation(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    layer = inputs.layer
    x = inputs.normal(1, FEW, layer.heads, layer.key_dim, seed=19).transpose(1, 2)
    cos, sin = (inputs.normal(1, FEW, layer.key_dim, seed=seed) for seed in (20, 21))
    return {"output": module.rotate(x, cos, sin)}


def _drawn(module: KernelModule, inputs: Inputs) -> dict[str, Tensor]:
    """Rows with each cut, with all and with none; the second row is left out."""
    rows = inputs.tensor([0, *range(2, 7)])
    cuts = [(1.0, 0, 1.0, 0.0), (0.7, 9, 1.0, 0.0), (1.5, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2), (0.9, 40, 0.9, 0.05)]
    sampling = [(*cut, 0.15 * number) for number, cut in enumerate([*cuts, cuts[0]])]
    logits = inputs.normal(len(sampling) + 1, TOKENS_TO_DRAW, seed=22)
    return {"tokens": module.draw(logits, rows, inputs.tensor(sampling, torch.float64).t().contiguous())}


PARTS: Mapping[str, Callable[[KernelModule, Inputs], dict[str, Tensor]]] = {
    "product": _product,
    "gate": _gate,
    "rms_norm": _norm,
    "offset_norm": _offset_norm,
    "gated_norm": _gated_norm,
    "rotate": _rotation,
    "draw": _drawn,
}
