"""How many workers there are, and where: on this machine by a Ray of our own, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bmx import hardware
from bmx.cluster.crew import Crew
from bmx.cluster.ray_cluster import joined_ray, local_ray
from bmx.config import FAKE, EngineConfig
from bmx.errors import UsageError
from bmx.run_config import RunConfig


@contextmanager
def crew(config: RunConfig) -> Iterator[Crew]:
    """The workers' processes, while the body runs.

    Raises:
        UsageError: more workers than GPUs, or no cluster at the address.
        BmxError: Ray cannot be started.
    """
    cluster, on_gpus, each = config.cluster, _may_use_gpus(config.engine), config.engine.tensor_parallel_size
    if cluster.ray_address is None:
        gpus, count = len(hardware.visible_gpus()) if on_gpus else 0, cluster.count
        _check_gpus(config.engine, count, gpus, "this machine")
        with local_ray(count, gpus):
            from bmx.cluster.ray_workers import RayCrew

            yield RayCrew(count, gpus=each if gpus else 0)
        return
    with joined_ray(cluster.ray_address):
        from bmx.cluster.ray_workers import RayCrew, gpus_of_cluster, nodes_of_cluster

        gpus = gpus_of_cluster() if on_gpus else 0
        count = cluster.workers or gpus // each or nodes_of_cluster()
        _check_gpus(config.engine, count, gpus, "the cluster")
        yield RayCrew(count, gpus=each if gpus else 0)


def _may_use_gpus(config: EngineConfig) -> bool:
    return config.model != FAKE and config.device != "cpu"


def _check_gpus(config: EngineConfig, workers: int, gpus: int, where: str) -> None:
    """Refuse workers that would have no GPU.

    Raises:
        UsageError: says how many GPUs there are.
    """
    each = config.tensor_parallel_size
    if gpus and workers * each > gpus:
        hint = f"--workers {gpus // each} at most, or --device cpu" if gpus >= each else "--device cpu"
        needed = "a GPU each" if each == 1 else f"{each} GPUs each"
        raise UsageError(f"{workers} workers need {needed}; {where} has {gpus}", hint=hint)
    if not gpus and config.device == "cuda" and config.model != FAKE:
        raise UsageError(f"{where} has no GPU", hint="--device cpu")
