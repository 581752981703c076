"""Independent pieces of work over processes, each with one thread: results do not depend on how many."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import cv2
import torch

from kit.nodes.agent import end_with

_given: list[tuple] = []  # in a worker: what every piece shares, sent once


def run(
    function: Callable, pieces: Sequence[Any], shared: tuple, processes: int = 0
) -> Iterator[Any]:
    """function(piece, *shared) of each piece, in order. processes: 0 works in this one.

    One thread each, here too: the sums of a matrix product depend on the number of threads.
    """
    if processes < 1 or len(pieces) < 2:
        for piece in pieces:
            with one_thread():
                result = function(piece, *shared)
            yield result
        return
    given = os.getpid(), function, *shared
    pool = ProcessPoolExecutor(
        min(processes, len(pieces)), get_context("spawn"), _start, given
    )
    with pool:
        try:
            yield from pool.map(_piece, pieces)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _start(parent: int, *given: Any) -> None:
    end_with(parent, signal.SIGKILL)  # a parent that is killed leaves nobody behind
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _given[:] = [given]


def _piece(piece: Any) -> Any:
    function, *shared = _given[0]
    return function(piece, *shared)
