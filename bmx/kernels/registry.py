"""One description of each back end, by the name of its module or its instruction set. Loads no torch.

To add a back end: a module here that implements ``contract.KernelModule``, its description in ``CAPABILITIES``, and the
condition under which ``bmx.kernels.choose`` takes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from bmx.kernels import workspace
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import FORMATS
from bmx.kernels.instruction_sets import SETS
from bmx.kernels.profile import KernelProfile
from bmx.kernels.ranking import FORMULAS, RANKS


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels for GPUs on the CPU: slow, and good for tests alone."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_PLAIN = KernelProfile(score_passes=16, thin_product=3.0, chunk_operators=30, decode_operators=36)
_TILED = KernelProfile(score_passes=5, thin_product=3.0, chunk_operators=60, decode_operators=36)
_COMPILED = KernelProfile(
    score_passes=0,
    thin_product=1.4,
    chunk_operators=6,
    decode_operators=4,
    own_operators=0.4,
    all_slots=False,
    slot_bandwidth=1.7,
    int8_speed=1.9,
    reads_by_channel=True,
)
_PROFILES = dict.fromkeys(SETS, _COMPILED)  # how the kernels of each instruction set use a machine's rates
_GPU = KernelProfile(
    score_passes=0,
    thin_product=2.0,
    chunk_operators=0,
    decode_operators=1,
    own_operators=0.6,
    all_slots=False,
    slot_bandwidth=0.8,
    ahead=True,
    reads_by_channel=True,
)


def _compiled(profile: KernelProfile) -> Capabilities:
    """Kernels in C++, whatever they are compiled for."""
    return Capabilities(
        model_dtypes=("bfloat16",),
        orders=FORMULAS,
        row_formats=("int8", "int4"),
        int8_multiples=(16, 32),
        mixes_in_place=True,
        reads_shared_rows=True,
        workspace=workspace.tiles,  # of types that are tiled; for bfloat16 the compiled code holds less
        profile=profile,
        wide_profile=_TILED,
    )


CAPABILITIES: Mapping[str, Capabilities] = {
    "reference": Capabilities(
        row_formats=tuple(FORMATS), reads_shared_rows=True, workspace=workspace.whole_matrices, profile=_PLAIN
    ),
    "cpu": Capabilities(reads_shared_rows=True, workspace=workspace.tiles, profile=_TILED),
    **{name: _compiled(profile) for name, profile in _PROFILES.items()},
    "triton": Capabilities(
        model_dtypes=() if interpreted() else ("bfloat16", "float16", "float32"),  # interpreting each token takes long
        joins_layers=True,
        orders=RANKS,
        asynchronous=True,
        capturable=True,
        skips_empty_rows=True,
        mixes_in_place=True,
        row_formats=("fp8", "int8", "int4"),
        workspace=workspace.fused_steps,
        unfused_workspace=workspace.whole_matrices,  # plain torch decodes then
        profile=_GPU,
    ),
}
