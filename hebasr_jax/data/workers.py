"""Where shards are made: in this process, in others of this machine, or by a Ray cluster."""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from hebasr_jax.data.shard_work import AGAIN, BadRow, ShardWork, make_shard
from hebasr_jax.data.sounds import Sounds
from hebasr_jax.errors import UserError

Workers = contextlib.AbstractContextManager["Crew"]


@dataclass(frozen=True)
class Crew:
    """Makes shards, `count` of them at a time.

    make: makes one and returns when it is there; called by many threads at once.
    stop: gives up those that are being made, within a clip, so that nothing half-written stays.
    """

    count: int
    make: Callable[[ShardWork], list[BadRow]]
    stop: Callable[[], None]


class _Child(NamedTuple):
    process: BaseProcess
    line: Connection


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, which ends voices and processes and what is half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    before = signal.signal(
        signal.SIGTERM, handler if callable(handler) else signal.default_int_handler
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def here() -> Iterator[Crew]:
    """One shard at a time, in this process."""
    lock, stop = threading.Lock(), threading.Event()

    def make(work: ShardWork) -> list[BadRow]:
        with lock:
            return make_shard(work, stop.is_set)

    yield Crew(1, make, stop.set)


@contextlib.contextmanager
def processes(count: int) -> Iterator[Crew]:
    """So many child processes, each started when it is needed first.

    Those of a parent that is killed end within a clip. Raises UserError, from `make`, when the
    system ends a child.
    """
    context = multiprocessing.get_context("spawn")  # a fork could copy locks that are held
    idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
    children: list[_Child] = []
    lock, stopping = threading.Lock(), threading.Event()
    for _ in range(count):
        idle.put(None)

    def start() -> _Child:
        line, its_end = context.Pipe()
        process = context.Process(target=_child, args=(its_end,), daemon=True)
        # Ctrl-C reaches children too, and is left to their parent: they inherit the mask, which
        # the start of the tracker would lift.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        its_end.close()  # so that its death ends the line
        children.append(_Child(process, line))
        return children[-1]

    def make(work: ShardWork) -> list[BadRow]:
        child = idle.get()
        try:
            with lock:  # no work is sent behind the word to stop
                if stopping.is_set():
                    return []
                child = child or start()
                child.line.send(work)
            answer = child.line.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"{work.folder}: a process that made shards was ended from outside",
                "The system may have run out of memory.",
                f"Give fewer --processes. {AGAIN}",
            ) from error
        finally:
            idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop() -> None:
        with lock:
            stopping.set()
            for child in children:
                with contextlib.suppress(OSError):  # it has ended
                    child.line.send(None)

    try:
        yield Crew(count, make, stop)
    finally:
        stop()
        for child in children:
            child.process.join()


@contextlib.contextmanager
def on_ray(address: str) -> Iterator[Crew]:
    """As many at a time as the Ray cluster has cores; its machines must see the same folders.

    address: of the cluster, "auto" for the one that this machine is part of, "local" for a new one
    of this machine's cores. Raises UserError where Ray is not installed or not reached.
    """
    try:
        import ray
    except ImportError as error:
        do = "pip install 'hebasr-jax[ray]'"
        raise UserError("--ray needs Ray", "it is not installed", do) from error
    try:
        ray.init(address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray {address}: no Ray cluster is reached",
            str(error).splitlines()[0][:200],
            "Start one with `ray start --head`, or give --ray local.",
        ) from error
    task = ray.remote(num_cpus=1, max_retries=3)(make_shard)
    running: set[Any] = set()

    def make(work: ShardWork) -> list[BadRow]:
        running.add(made := task.remote(_absolute(work)))
        try:
            return ray.get(made)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            why = str(error).splitlines()[0][:200]
            raise UserError(f"{work.folder}: Ray lost a task", why, AGAIN) from error
        finally:
            running.discard(made)

    def stop() -> None:
        for made in list(running):
            ray.cancel(made)

    try:
        count = int(ray.cluster_resources().get("CPU", 1))
        yield Crew(count, make, stop)
    finally:
        ray.shutdown()


def _absolute(work: ShardWork) -> ShardWork:
    """The same work for a process that was started in another folder."""
    assert isinstance(work.read, Sounds)
    files = {place.file: place.file.absolute() for place in work.read.places}
    return replace(work, folder=work.folder.absolute(), read=work.read.moved(files))


def _child(line: Connection) -> None:
    """Makes what is sent, until nothing is; a parent that is gone sends nothing too."""
    answer: list[BadRow] | Exception
    with contextlib.suppress(EOFError, OSError):
        while work := line.recv():
            try:
                answer = make_shard(work, line.poll)
            except Exception as error:
                answer = error
            line.send(answer)
