"""Ray itself: started on this machine for one job, or joined where it stands, and left so that nothing of it stays.

A Ray of our own listens on 127.0.0.1 alone, asks for a token that only this job's processes have, and reports nothing
to anybody.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from bmx.cluster import janitor
from bmx.cluster_config import AUTO
from bmx.errors import BmxError, UsageError
from bmx.shutdown import Interrupted

EVERYWHERE = {"RAY_USAGE_STATS_ENABLED": "0"}
LOCAL = EVERYWHERE | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system it is what makes Ray listen on 127.0.0.1 alone
    "RAY_AUTH_MODE": "token",
    "RAY_memory_monitor_refresh_ms": "0",  # what bmx may use is in its plan; Ray would end workers that use it
}
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105, the name of a variable
OBJECT_BYTES = 100 << 20  # for rows and results under way
REPLACED = (signal.SIGINT, signal.SIGTERM)  # signals whose handlers Ray replaces
HERE = ("localhost", "127.0.0.1", "::1")  # Ray takes this machine's other address for these
CONNECT_SECONDS = 5.0
LAST_PORT = 65535
LONGEST_FOLDER = 20  # bytes of a path under which Ray's sockets still have names that are short enough
QUIET: Mapping[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}


@contextmanager
def local_ray(workers: int, gpus: int) -> Iterator[None]:
    """A Ray on this machine while the body runs.

    Args:
        workers: actors that it will have.
        gpus: GPUs that they may use.

    Raises:
        BmxError: Ray cannot be started.
    """
    with _environment(LOCAL | {TOKEN: _token()}), _folder() as folder:
        try:
            _init(address="local", num_cpus=workers, num_gpus=gpus, object_store_memory=OBJECT_BYTES, _temp_dir=folder)
            yield
        finally:
            _shutdown()


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """A Ray cluster that stands already, while the body runs.

    Args:
        address: ``auto``, or HOST:PORT.

    Raises:
        UsageError: there is no cluster at the address.
    """
    with _environment(EVERYWHERE):
        try:
            if address != AUTO:
                _reach(address)
            _init(address=address)
        except ConnectionError as error:
            hint = (
                "`ray start --head` starts one; one that wants a token is joined with RAY_AUTH_MODE=token; "
                "without --ray-address, workers run on this machine"
            )
            raise UsageError(f"no Ray cluster at {address} can be joined", hint=hint) from error
        try:
            yield
        finally:
            _shutdown()


def _reach(address: str) -> None:
    """Look whether anything listens at an address, which Ray would wait for minutes to find out.

    Raises:
        ConnectionError: nothing does.
        UsageError: it is no address.
    """
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > LAST_PORT:
        raise UsageError(f"ray_address cannot be {address!r:.80}", hint=f"{AUTO}, or HOST:PORT, as `ray start` says it")
    host = host.strip("[]")
    for name in (host, get_node_ip_address()) if host in HERE else (host,):
        with suppress(OSError), socket.create_connection((name, int(port)), timeout=CONNECT_SECONDS):
            return
    raise ConnectionError


def _init(**settings: Any) -> None:
    """Start or join Ray, with this process's own handlers of signals before and afterwards.

    Raises:
        BmxError: it cannot be started.
        ConnectionError: it cannot be joined.
    """
    before = {number: signal.getsignal(number) for number in REPLACED}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # Ray's processes inherit it, and outlive a terminal
    try:
        import ray
        from ray._private import worker

        worker.print_to_stdstream = lambda *_, **__: None  # it writes to standard output, which is for answers
        ray.init(logging_level=logging.CRITICAL, **QUIET, **settings)
    except SystemExit as ended:  # what Ray's handler of SIGTERM makes of it
        raise Interrupted(signal.SIGTERM) from ended
    except ConnectionError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise BmxError(f"Ray cannot be started: {cause}", hint="without --workers, bmx needs no Ray") from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        for number, handler in before.items():
            signal.signal(number, handler)


def lost_processes() -> list[str]:
    """Processes of a Ray of our own that have ended by themselves."""
    from ray._private import worker

    node = worker._global_node
    return [str(kind) for kind, _ in node.dead_processes()] if node else []


@cache
def _token() -> str:
    """The secret of this process's own Ray: one for all, since Ray reads it once."""
    return secrets.token_hex(32)


def _shutdown() -> None:
    import ray

    ray.shutdown()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that are set while the body runs; Ray's processes inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _folder() -> Iterator[str]:
    """A folder for Ray's files, which is deleted at the end, after a kill of this process too."""
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="bmx-ray-", dir=usual if len(os.fsencode(usual)) <= LONGEST_FOLDER else "/tmp")  # noqa: S108
    command = [sys.executable, "-I", "-S", janitor.__file__, folder]
    cleaning = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield f"{folder}/ray"  # which Ray opens to all users; they cannot reach it
    finally:
        cleaning.communicate()
