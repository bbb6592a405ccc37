"""Work in several processes that end when the one that asked for it does, however that ends.

Threads would not do: h5py reads and decompresses one array at a time in a process, and a simulator keeps one core busy.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) as they are done; in this process where there is one worker or item.

    What `work` raises is raised here, after those that have begun are waited for. `work` and items must pickle.
    Raises `ChildProcessError` where a process is killed (memory, a crash); `what` is what it was doing.
    """
    if min(workers, len(items)) <= 1:
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("spawn")  # a forked one would share locks and graphics
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_begin)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ChildProcessError(f"a process {what} was killed (too little memory, or a crash): try workers=1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, ahead: int = 4
) -> Iterator[Result]:
    """work(item) of each item in turn, up to `ahead` results a worker being ready before they are asked for.

    As `in_processes` otherwise.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(items)), mp_context=multiprocessing.get_context("spawn"), initializer=_begin
    )
    try:
        waiting = deque[Future[Result]]()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"a process {what} ended (too little memory, a crash, or a script that does not do its work under "
            '`if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_while_importing() -> None:
    """Raises `RuntimeError` in a process that was just started, and does again what the script that started it does.

    So a script without a main guard ends with a word about it, instead of waiting for what it has locked itself.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError('do this under `if __name__ == "__main__":`, since it starts processes')


def _begin() -> None:
    """Ctrl-C ends a worker at once; so does the end of its parent, which else it would wait for."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job in the background is not to hear Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
