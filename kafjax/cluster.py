"""The processes of a dask cluster, for `--cluster local|slurm|ADDRESS`.

    local      a scheduler and workers of this machine, on the loopback interface
    slurm      jobs of a SLURM, each a worker, as dask-jobqueue's configuration describes them
    ADDRESS    a scheduler that is running, as tcp://host:8786

Workers need this installation and the same files under the same paths. dask moves the work of a
worker that dies to another one; what cost four workers their lives is given up.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kafjax.errors import UserError, import_extra

_ANSWER_SECONDS = 10
# Of a worker, unless dask-jobqueue's configuration has them.
_SLURM = {"cores": 1, "processes": 1, "memory": "8 GB"}


@contextlib.contextmanager
def open_cluster(place: str, slots: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    """A `distributed.Client`; what is started here ends with it.

    Args:
      place: local, slurm or a scheduler's address.
      slots: the environment of each worker; on SLURM their number counts, at an address none does.

    Raises:
      ValueError: dask is missing, or the cluster cannot be had.
    """
    distributed = import_extra("distributed")
    with contextlib.ExitStack() as stack:
        if place == "local":
            target = stack.enter_context(_local_cluster(distributed, slots))
        elif place == "slurm":
            target = stack.enter_context(_slurm_cluster(len(slots)))
        elif "://" in place:
            target = place
        else:
            raise UserError(
                f"--cluster: found {place!r}, expected local, slurm or a scheduler's address, as "
                "tcp://host:8786"
            )
        try:
            client = stack.enter_context(distributed.Client(target, timeout=_ANSWER_SECONDS))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--cluster {place}: no scheduler of dask answers ({reason})") from None
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"--cluster {place}: waiting for a first worker", file=sys.stderr, flush=True)
        yield client


def _local_cluster(distributed: Any, slots: Sequence[Mapping[str, str]]) -> Any:
    here = {"host": "127.0.0.1", "dashboard_address": ":0"}
    worker = {
        "nthreads": 1,
        "memory_limit": 0,
        "silence_logs": logging.ERROR,
        **here,
        # Ctrl-C at a terminal reaches them too, and is for the parent to handle.
        "preload": ["import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\n"],
    }
    return distributed.SpecCluster(
        scheduler={"cls": distributed.Scheduler, "options": here},
        workers={
            i: {"cls": distributed.Nanny, "options": {**worker, "env": dict(environment)}}
            for i, environment in enumerate(slots)
        },
        silence_logs=logging.ERROR,
    )


def _slurm_cluster(number: int) -> Any:
    jobqueue, dask = import_extra("dask_jobqueue"), import_extra("dask")
    options = {
        name: value
        for name, value in _SLURM.items()
        if dask.config.get(f"jobqueue.slurm.{name}", None) is None
    }
    try:
        cluster = jobqueue.SLURMCluster(**options, scheduler_options={"dashboard_address": ":0"})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--cluster slurm: {' '.join(str(error).split())[:200]}") from None
    # Jobs that end, by their time limit or for others, are replaced; `scale` would not.
    cluster.adapt(minimum=number, maximum=number)
    return cluster


def resources_of(client: Any) -> dict[str, float]:
    """What a job that trains asks of its worker: a GPU, if workers were started with that resource.

    A worker's GPU is that of its environment (`CUDA_VISIBLE_DEVICES`).
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else {}
