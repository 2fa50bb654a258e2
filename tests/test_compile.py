"""What is written in Triton compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import aot


@pytest.mark.parametrize("arch", aot.TESTED)
def test_kernels_compile_for_gpus_and_fit_into_them(arch):
    """Some launches for one GPU; ``python tests/aot.py`` compiles all of them."""
    kernels = aot.built(arch)
    assert {kernel.module for kernel in kernels} == set(aot.TESTED[arch])
    assert [kernel for kernel in kernels if not kernel.fits] == []


def test_every_file_of_kernels_is_compiled():
    assert {module for modules in aot.TESTED.values() for module in modules} == set(aot.MODULES)
