"""Finds the k rows of largest score by screening in low precision, with proof.

What is exact. Stored values are float16, so a product of two of them is a multiple of 2^-48.
Lengths are 1 within 1 %, so the absolute products of a row sum to less than 2, and every
partial sum is a multiple of 2^-48 below 2^5: 53 bits hold it. An inner product in float64 is
therefore exact in any order, hence the same for any block size, thread, process and device.
Scores are those products (weighted and summed over the models in their order, then the
addends), rounded once to float32. Rows are ordered by that score, equal ones by their number.

What is screened. x' and q' are rows and queries rounded to the screening type, and t the
score that a gemm with float32 accumulators gives, before it is rounded to that type. Then
|s - t| <= |q - q'| |x'| + |q| |x - x'| + 2 D 2^-24 |q'| |x'| (Cauchy-Schwarz twice; the last
term covers any order of D additions, even truncated ones), with lengths and distances
measured. `slack` covers float32 arithmetic on bounds and addends, and the rounding of scores:
16 units in the last place of the largest possible score. Their sum is the margin.

Why no row is lost. `floor` never exceeds a query's k-th best final score: it is the k-th
largest of lower bounds of as many different rows. A row among the best has s >= floor up to
float32's rounding, hence t >= floor - margin, and rounding t keeps that order. So whoever has
a rounded score below floor - margin, itself rounded down, is not among the best. Groups of
rows are skipped by their largest score and largest addend. All others are scored exactly in
the end; where there are too many (rows that are equal, or nearly) the block is scored
exactly at once.

Members of `Addends` are screened pair by pair, some scored exactly before anything else, and
hidden from the screening of chunks, so their addends do not widen it. Rows are walked in the order of groups and `by_row`, so the addends
hardly vary within a chunk.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kit.features.certified.rounding import plain_gemm
from kit.features.certified.task import CHUNK, Task, unpack
from kit.features.certified.walk import Walk
from kit.features.certified.worker import Worker


def nearest(task: Task, queries: slice) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) float32 and positions (Q, k) of the best; -inf and -1 where there are none.

    The process's number of torch threads is 1 while CPU workers run, and as before after it.
    """
    walk = Walk(task, queries)
    threads = torch.get_num_threads()
    try:
        with plain_gemm(), ThreadPoolExecutor(len(task.devices)) as pool:
            workers = [Worker(walk, device) for device in task.devices]
            if len(walk.starts) * task.block < 2 * CHUNK * task.k:
                walk.score_members(pool, len(task.span))
                walk.share(pool, workers, Worker.score_exactly, walk.starts)
            else:
                walk.score_members(pool, task.k)
                walk.share(pool, workers, Worker.sample, walk.sampled())
                walk.start()
                walk.share(pool, workers, Worker.screen, walk.starts)
                walk.settle(pool)
    finally:
        torch.set_num_threads(threads)
    return unpack(walk.best)
