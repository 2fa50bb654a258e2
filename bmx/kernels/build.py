"""Compiles the C++ kernels for this processor, once, and stores the library in the user's cache.

Knows compilers, caches and where torch keeps its OpenMP; imports no torch, and knows nothing of what is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bmx import hardware

SOURCE = Path(__file__).with_name("avx512.cpp")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-fopenmp", "-w")
TIMEOUT = 120  # seconds that a compiler may take


class CannotBuildError(Exception):
    """The compiled kernels cannot be built on this machine; its text says why."""


@cache
def library() -> ctypes.PyDLL | str:
    """The compiled kernels, loaded; or the reason why this machine cannot have them."""
    try:
        return _library()
    except CannotBuildError as reason:
        return str(reason)


def _library() -> ctypes.PyDLL:
    missing = [name for name in NEEDED if name not in hardware.cpu_flags()]
    if missing:
        raise CannotBuildError(f"the processor has no {missing[0]}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if not compiler:
        raise CannotBuildError("no C++ compiler is installed (g++ or clang++)")
    openmp = _openmp()
    cached = _cached(compiler, openmp)
    with suppress(OSError):  # missing, or damaged
        return ctypes.PyDLL(str(cached))
    with tempfile.TemporaryDirectory(prefix="bmx-") as folder:
        built = _compile(compiler, openmp, Path(folder))
        with suppress(OSError):  # without a cache, the next process compiles again: four seconds
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}")
            shutil.copy(built, partial)
            partial.replace(cached)
        try:
            return ctypes.PyDLL(str(built))
        except OSError as error:
            raise CannotBuildError(f"the library that {compiler} built cannot be loaded: {error}") from None


def _openmp() -> Path:
    """The OpenMP library that torch brings; with another one, its threads would compete with torch's for the cores."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    libraries = sorted(folder.glob("libgomp*.so*")) if folder else []
    if not libraries:
        raise CannotBuildError("torch comes without the OpenMP library of GNU")
    return libraries[0]


def _cached(compiler: str, openmp: Path) -> Path:
    """Where the library for this source, processor, compiler and torch is cached."""
    from platformdirs import user_cache_path

    parts = (hardware.cpu_name(), *sorted(hardware.cpu_flags()), *FLAGS, str(shutil.which(compiler)), str(openmp))
    source = b"".join(path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    digest = hashlib.sha256("\n".join(parts).encode() + source).hexdigest()[:32]
    return user_cache_path("bmx") / "kernels" / f"{SOURCE.stem}-{digest}.so"


def _compile(compiler: str, openmp: Path, folder: Path) -> Path:
    """Compile and link; returns the library.

    Raises:
        CannotBuildError: the compiler fails, takes too long, or cannot be started.
    """
    objects, built = folder / "kernels.o", folder / "kernels.so"
    commands = (
        (compiler, *FLAGS, "-c", str(SOURCE), "-o", str(objects)),
        (compiler, "-shared", str(objects), str(openmp), f"-Wl,-rpath,{openmp.parent}", "-o", str(built)),
    )
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"exit {error.returncode}"]
            raise CannotBuildError(f"{compiler} cannot compile them: {lines[0]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuildError(f"{compiler} does not work: {error}") from None
    return built
