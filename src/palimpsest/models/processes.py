"""Long work done side by side, in processes of one thread that end with whoever started them, however that ends.

Each worker sends its news through a pipe of which it and its parent hold the only ends. When the parent is gone, even
killed with -9, sending fails and the worker stops; when a worker is gone, the parent reads the end of the pipe.

Where the system has it, workers are forked from a server that has imported what the work is made of and nothing else:
importing torch and transformers takes longer than many a small training.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from palimpsest.errors import PalimpsestError, TrainingError
from palimpsest.progress import Report, progress

CONTEXT: "multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext" = (
    multiprocessing.get_context("forkserver")
    if "forkserver" in multiprocessing.get_all_start_methods()
    else multiprocessing.get_context("spawn")
)
"""What workers are started by, and what they share is made by."""
PATIENCE = 10
"""Seconds a worker is given to reach its next report once nobody listens."""


@dataclass(frozen=True)
class _Worker:
    name: str
    process: BaseProcess
    news: Connection


def side_by_side(work: Mapping[str, Callable[[Report], None]]) -> None:
    """Do all the work at once and show the progress of each. When one fails or Ctrl-C is pressed, all are stopped.

    Args:
        work: by name; picklable, called in its own process with a report to keep calling.

    Raises:
        PalimpsestError: a worker's own.
        TrainingError: a worker died.
    """
    workers: list[_Worker] = []
    try:
        for name, task in work.items():
            workers.append(_start(name, task))
        _follow(workers)
    finally:
        for worker in workers:
            worker.news.close()
        for worker in workers:
            worker.process.join(PATIENCE)
            worker.process.terminate()


def _start(name: str, task: Callable[[Report], None]) -> _Worker:
    CONTEXT.set_forkserver_preload([getattr(task, "func", task).__module__])  # heard by the server when it starts
    news, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(task, theirs, dict(os.environ)), daemon=True)
    with _ignoring_interrupts():
        process.start()
    theirs.close()
    return _Worker(name, process, news)


def _work(task: Callable[[Report], None], news: Connection, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # the server's may be older
    torch.set_num_threads(1)
    with suppress(BrokenPipeError):  # nobody listens any more
        try:
            task(lambda step, n_steps, note: news.send((step, n_steps, note)))
        except PalimpsestError as error:
            news.send(error)


def _follow(workers: list[_Worker]) -> None:
    """Show the news until every worker has ended."""
    with progress() as display:
        tasks = {worker.name: display.add_task(worker.name, total=None, note="starting") for worker in workers}
        while workers:
            ready = wait([worker.news for worker in workers])
            for worker in [worker for worker in workers if worker.news in ready]:
                try:
                    message = worker.news.recv()
                except EOFError:
                    _check_end(worker)
                    workers = [other for other in workers if other is not worker]
                    continue
                if isinstance(message, PalimpsestError):
                    raise message
                step, n_steps, note = message
                display.update(tasks[worker.name], completed=step, total=n_steps, note=note)


def _check_end(worker: _Worker) -> None:
    worker.process.join()
    if worker.process.exitcode:
        raise TrainingError(
            f"{worker.name}: its process died with exit code {worker.process.exitcode} (-9: killed, often for want of "
            "memory); run again, and it goes on from its last checkpoint"
        )


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C, which a terminal sends to all of them; their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change this
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
