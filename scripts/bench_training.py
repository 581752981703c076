"""Rows of `bench.py training`: the classifier's step, its memory and its exchange."""

import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_loader import loader_rows
from torch import Tensor, nn
from torch.nn import functional as F

from kit.losses.heads import Classifier, Head

CLASSES, DIM, BATCH = 203_094, 512, 64  # GLDv2's full list
FEW_CLASSES = 20_000  # with --quick
SPEED, MEMORY, EXCHANGE = (
    2.5,
    0.6,
    50.0,
)  # times as fast, share of theirs, times as fast
STEPS = 10  # of the exchange in a turn
GRADIENT = 1e-5  # largest error, as a share of the largest entry


class PlainArcFace(nn.Module):
    """The baseline: ArcFace as its paper states it, by autograd, with a one-hot matrix."""

    def __init__(
        self, weight: Tensor, margin: float = 0.3, scale: float = 30.0
    ) -> None:
        super().__init__()
        self.weight, self.margin, self.scale = nn.Parameter(weight), margin, scale

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(embedding), F.normalize(self.weight))
        sine = (1 - cosine.square()).clamp(0, 1).sqrt()
        bent = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        straight = cosine - math.sin(math.pi - self.margin) * self.margin
        bent = torch.where(cosine > math.cos(math.pi - self.margin), bent, straight)
        one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1)
        logits = one_hot * bent + (1 - one_hot) * cosine
        return F.cross_entropy(self.scale * logits, labels)


def classifier(bench: Any) -> Iterator[dict[str, Any]]:
    """Forward, backward and SGD update; then the error of the gradients, against float64."""
    classes = FEW_CLASSES if bench.quick else CLASSES
    place = f"{classes:,} x {DIM}, batch {BATCH}"
    ours, theirs = _Step("ours", classes), _Step("theirs", classes)
    ours_s, theirs_s = bench.interleaved(ours, theirs)
    yield bench.speed(f"classifier step, {place}", ours_s, theirs_s, SPEED, False)
    del ours, theirs
    error = _gradient_error(classes)
    yield bench.row(f"classifier gradients, {place}", GRADIENT / error, 1, False)


def memory(bench: Any) -> Iterator[dict[str, Any]]:
    """What a process of three such steps takes at its peak, without interpreter and torch."""
    classes = FEW_CLASSES if bench.quick else CLASSES
    name = f"classifier memory, {classes:,} x {DIM}, batch {BATCH}"
    if not Path("/proc/self/status").exists():
        yield bench.missing(name, "needs Linux's /proc")
        return
    used = {}
    for side in ("ours", "theirs"):
        used[side] = float(_in_processes(_peak, 1, side, classes))
        print(f"  {side}: {used[side] / 2**20:.0f} MiB")
    yield bench.row(name, MEMORY * used["theirs"] / used["ours"], 1, False)


def exchange(bench: Any) -> Iterator[dict[str, Any]]:
    """What two ranks exchange in a step, against the whole gradient of a copy on each."""
    classes = FEW_CLASSES if bench.quick else CLASSES
    name = f"sharded exchange, 2 gloo ranks, {classes:,} x {DIM}"
    if not dist.is_gloo_available():
        yield bench.missing(name, "this torch has no gloo")
        return
    ours_s, theirs_s = _in_processes(_exchange, 2, classes, bench.rounds)
    yield bench.speed(name, ours_s, theirs_s, EXCHANGE, False)


ROWS = [memory, classifier, exchange, loader_rows]


class _Step:
    """One side's classifier, optimiser and batch; a call is a step."""

    def __init__(self, side: str, classes: int) -> None:
        torch.manual_seed(0)
        self.embedding = torch.randn(BATCH, DIM)
        self.labels = torch.randint(classes, (BATCH,))
        if side == "ours":
            counts = torch.ones(classes, dtype=torch.int64)
            self.head: nn.Module = Classifier(Head(), DIM, counts)
        else:
            weight = nn.init.xavier_uniform_(torch.empty(classes, DIM))
            self.head = PlainArcFace(weight)
        self.optimizer = torch.optim.SGD(
            self.head.parameters(), 1e-2, momentum=0.9, fused=side == "ours" or None
        )

    def __call__(self) -> None:
        loss = self.head(self.embedding.clone().requires_grad_(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _gradient_error(classes: int) -> float:
    step = _Step("ours", classes)
    exact = PlainArcFace(step.head.weight.detach().double())
    gradients = []
    for head, embedding in (
        (step.head, step.embedding.clone()),
        (exact, step.embedding.double()),
    ):
        head(embedding.requires_grad_(), step.labels).backward()
        gradients.append((embedding.grad, head.weight.grad))
    errors = [
        (own - right).abs().max() / right.abs().max()
        for own, right in zip(*gradients, strict=True)
    ]
    return max(errors).item()


def _in_processes(function: Any, processes: int, *arguments: Any) -> Any:
    """What `function(rank, folder, *arguments)` of rank 0 returns; each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_leave, (function, folder, arguments), processes)
        return json.loads((Path(folder) / "result.json").read_text())


def _leave(rank: int, function: Any, folder: str, arguments: tuple[Any, ...]) -> None:
    result = function(rank, folder, *arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))


def _peak(rank: int, folder: str, side: str, classes: int) -> int:
    """Bytes. The kernel's VmHWM: ru_maxrss would begin with the parent's."""
    before = _status("VmRSS")
    step = _Step(side, classes)
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[1])


def _exchange(rank: int, folder: str, classes: int, rounds: int) -> tuple[float, float]:
    """Median seconds inside collectives: of a classifier's step, of the all-reduce.

    What ranks exchange does not depend on the number of classes, so the classifier has one a
    rank. A turn of ours is the mean of STEPS steps: a single one is a matter of when the
    system wakes a rank. Waiting for the other rank counts.
    """
    # as kit.launch does: ranks with more threads than cores wait for each other's
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    head = Classifier(Head(), DIM, torch.ones(2, dtype=torch.int64), rank, 2)
    embedding, labels = torch.randn(BATCH, DIM), torch.randint(2, (BATCH,))
    gradient = torch.randn(classes, DIM)
    spent: list[float] = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(dist, name, _timed(getattr(dist, name), spent))

    def step() -> None:
        head(embedding.clone().requires_grad_(), labels).backward()

    seconds: tuple[list[float], list[float]] = ([], [])
    sides = ((step, STEPS), (lambda: dist.all_reduce(gradient), 1))
    for turn in range(rounds + 1):
        for (function, times), kept in zip(sides, seconds, strict=True):
            dist.barrier()
            spent.clear()
            for _ in range(times):
                function()
            if turn:
                kept.append(sum(spent) / times)
    dist.destroy_process_group()
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _timed(collective: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = collective(*given, **named)
        spent.append(time.perf_counter() - start)
        return result

    return timed
