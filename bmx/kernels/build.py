"""Compiles the C++ kernels for this processor, once, and stores the library in the user's cache.

Knows compilers, caches and where torch keeps its OpenMP; imports no torch, and knows nothing of what is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bmx import hardware
from bmx.cache import cache_folder, store, warn_once

SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-fopenmp", "-w", "-ffp-contract=off", "-fno-strict-aliasing")
TIMEOUT = 120  # seconds that a compiler may take


logger = logging.getLogger(__name__)


class CannotBuildError(Exception):
    """The compiled kernels cannot be built on this machine; its text says why."""


@cache
def library() -> ctypes.PyDLL | str:
    """The compiled kernels, loaded; or the reason why this machine cannot have them."""
    missing = [name for name in NEEDED if name not in hardware.cpu_flags()]
    if missing:
        return f"the processor has no {missing[0]}"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if not compiler:
        return "no C++ compiler is installed (g++ or clang++)"
    try:
        openmp = _openmp()
        return _cached(compiler, openmp) or _built(compiler, openmp)
    except CannotBuildError as reason:
        logger.warning("there are no compiled kernels, which makes runs slower: %s", reason)
        return str(reason)


def _cached(compiler: str, openmp: Path) -> ctypes.PyDLL | None:
    """The library from the cache, if it is there, this user's own, and as it was written."""
    with suppress(OSError):
        folder, key = cache_folder("kernels"), _key(compiler, openmp)
        for file in folder.glob(f"{key}-*.so"):
            with suppress(OSError):
                if file.stat().st_uid == os.geteuid() and file.name == _name(key, file.read_bytes()):
                    return ctypes.PyDLL(str(file))
    return None


def _built(compiler: str, openmp: Path) -> ctypes.PyDLL:
    """The library, compiled now and stored in the cache."""
    try:
        with tempfile.TemporaryDirectory(prefix="bmx-", ignore_cleanup_errors=True) as folder:
            built = _compile(compiler, openmp, Path(folder))
            try:
                content = built.read_bytes()
                store(cache_folder("kernels") / _name(_key(compiler, openmp), content), content)
            except OSError as error:
                warn_once(f"the compiled kernels cannot be kept ({error.strerror}), and are compiled in each run")
            return ctypes.PyDLL(str(built))
    except OSError as error:
        raise CannotBuildError(f"the library that {compiler} builds cannot be stored or loaded: {error}") from None


def _openmp() -> Path:
    """The OpenMP library that torch brings; with another one, its threads would compete with torch's for the cores."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    libraries = sorted(folder.glob("libgomp*.so*")) if folder else []
    if not libraries:
        raise CannotBuildError("torch comes without the OpenMP library of GNU")
    return libraries[0]


def _key(compiler: str, openmp: Path) -> str:
    """The part of the library's name that tells the source, processor, compiler and torch that it is for."""
    parts = (hardware.cpu_name(), *sorted(hardware.cpu_flags()), *FLAGS, str(shutil.which(compiler)), str(openmp))
    source = b"".join(path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    digest = hashlib.sha256("\n".join(parts).encode() + source).hexdigest()[:32]
    return f"{SOURCE.stem}-{digest}"


def _name(key: str, content: bytes) -> str:
    """The library's file name: it ends with a digest of the content, since half a library ends the process."""
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


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
