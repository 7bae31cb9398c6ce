"""Jobs in parallel processes, of this machine or a cluster; one that dies is named with its job.

Processes are spawned, never forked, so that no library's threads or locks are copied. They end with
their parent: a killed run leaves none behind. (`concurrent.futures` ends the whole pool when one
process dies, and cannot say which job it held.)
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import cv2

from kafjax.errors import import_extra

_SPAWN = multiprocessing.get_context("spawn")


class WorkerDied(RuntimeError):  # noqa: N818 - it states what happened
    """The process that held a job ended without an answer: killed, mostly for lack of memory."""


def map_in_processes(
    function: Callable[[Any], Any], jobs: Mapping[str, Any], *, num_workers: int, client: Any = None
) -> Generator[tuple[str, Any], None, None]:
    """Yields (name, result) of `function(job)` for each named job, in completion order.

    An exception of the function is the result, not raised; so is `WorkerDied`, after which a new
    process continues with the other jobs. `function` must be importable by name. With `num_workers`
    0 the jobs run in this process, one after the other. Closing the iterator ends all workers.
    With a `client` of `kafjax.cluster` the jobs run on its workers, which close with their cluster.
    """
    if client is not None:
        yield from _map_on_cluster(function, jobs, client)
        return
    if num_workers == 0:
        yield from ((name, _call(function, job)) for name, job in jobs.items())
        return
    waiting = list(jobs.items())[::-1]
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.job for worker in crew):
            crew = [worker for worker in crew if worker.alive]
            while len(crew) < min(num_workers, len(waiting) + sum(bool(w.job) for w in crew)):
                with _interrupted_later():
                    crew.append(_Worker(function))
            for worker in crew:
                if waiting and worker.job is None:
                    worker.start(*waiting.pop())
            ready = wait([worker.connection for worker in crew if worker.job])
            for worker in [worker for worker in crew if worker.connection in ready]:
                yield worker.finish()
    finally:
        for worker in crew:
            worker.end()


def _map_on_cluster(
    function: Callable[[Any], Any], jobs: Mapping[str, Any], client: Any
) -> Generator[tuple[str, Any], None, None]:
    """`map_in_processes` with dask, which moves the jobs of a worker that dies to another one."""
    distributed = import_extra("distributed")
    call = functools.partial(_call_alone, function)
    # Jobs are not pure: their results are files, which may be missing the next time.
    names = {client.submit(call, job, pure=False): name for name, job in jobs.items()}
    completed = distributed.as_completed(list(names), with_results=True, raise_errors=False)
    try:
        for future, result in completed:
            if future.status == "error":
                result = WorkerDied(" ".join(str(future.exception()).split()))
            yield names.pop(future), result
    finally:
        client.cancel(list(names))


def _call_alone(function: Callable[[Any], Any], job: Any) -> Any:
    cv2.setNumThreads(1)  # the processes share the cores
    return _call(function, job)


class _Worker:
    """One process and the job that it holds."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(function, theirs), daemon=True)
        self._process.start()
        theirs.close()  # otherwise this process would not notice that the worker died
        self.job: str | None = None
        self.alive = True

    def start(self, name: str, job: Any) -> None:
        self.job = name
        with contextlib.suppress(OSError):  # the worker has died: `finish` reports it
            self.connection.send(job)

    def finish(self) -> tuple[str, Any]:
        """The name and result of the job, once the connection is ready."""
        name, self.job = self.job, None
        assert name is not None
        try:
            return name, self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self.alive = False
            return name, WorkerDied(_how_it_died(self._process.exitcode))

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Defers Ctrl-C so that no process is left half started; processes started here ignore it.

    They inherit the blocked signal, which the parent handles. Blocking is not enough for the
    parent, where a library's thread may receive the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()  # only this one receives Ctrl-C
    came: list[int] = []
    if in_main:
        handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _how_it_died(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return "its worker process was killed (signal 9), most likely because memory ran out"
    if exitcode is not None and exitcode < 0:
        return f"its worker process was ended by signal {-exitcode}"
    return f"its worker process ended with exit status {exitcode}"


def _call(function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return function(job)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's loop: receives jobs and sends results until the parent closes or dies."""
    cv2.setNumThreads(1)  # the processes share the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, job))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
