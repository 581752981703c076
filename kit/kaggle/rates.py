"""Networks and photos -> what an image costs here: a measurement of a few seconds."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kit.data.images import EvalImages, in_worker
from kit.data.inputs import View
from kit.features.views import Views, embed
from kit.models.net import EmbeddingNet, half_precision


class Rates(NamedTuple):
    """What was measured; of the whole machine."""

    decode: float  # images/s of the loader, all views
    seconds: Mapping[str, Mapping[float, float]]  # model, scale: of an image


def measure(
    nets: Mapping[str, EmbeddingNet],
    how: Views,
    data: Path,
    paths: np.ndarray,
    *,
    device: torch.device,
    gpus: int = 1,
    seconds: float = 30.0,
    batch: int = 32,
    workers: int = 2,
) -> Rates:
    """Images/s of the loader, then seconds an image of every network at every scale.

    nets: on `device`, in eval mode; paths: (N,) photos in `data`, gone through again and
    again; gpus: of which one is measured. Views are the networks' squares.
    """
    views = {name: how.each(net.config.input) for name, net in nets.items()}
    for shown in views.values():
        if shown[0].spec.template:
            raise ValueError(f"template {shown[0].spec.template} is not measured")
    every = list(dict.fromkeys(itertools.chain.from_iterable(views.values())))
    share = seconds / (1 + sum(map(len, views.values())))
    speed, pictures = _loader(data, paths, every, share, batch, workers)
    half = half_precision(device)
    found: dict[str, dict[float, float]] = {}
    for name, net in nets.items():
        found[name] = {}
        for scale, view in zip(how.scales, views[name], strict=True):
            x = pictures[every.index(view)].to(device)

            def look(net: EmbeddingNet = net, x: Tensor = x) -> None:
                with torch.autocast(device.type, half, enabled=half is not None):
                    embed(net, [x], how.flip, how.normalise).cpu()  # waits for it

            found[name][scale] = _seconds(look, share) / len(x) / gpus
    return Rates(speed, found)


def _loader(
    data: Path,
    paths: np.ndarray,
    views: Sequence[View],
    seconds: float,
    batch: int,
    workers: int,
) -> tuple[float, list[Tensor]]:
    """Images/s, and the last batch."""
    rows = itertools.cycle(range(len(paths)))
    loader = DataLoader(
        EvalImages(data, paths, views),
        batch_sampler=(list(itertools.islice(rows, batch)) for _ in itertools.count()),
        num_workers=workers,
        worker_init_fn=in_worker,
    )
    loaded = iter(loader)
    pictures, _ = next(loaded)  # the workers have started
    count, start = 0, time.monotonic()
    while not count or time.monotonic() - start < seconds:
        pictures, _ = next(loaded)
        count += len(pictures[0])
    return count / (time.monotonic() - start), pictures


def _seconds(work: Callable[[], None], patience: float) -> float:
    """The median of a call, the first one left out."""
    work()
    took, start = [], time.monotonic()
    while not took or time.monotonic() - start < patience:
        before = time.monotonic()
        work()
        took.append(time.monotonic() - before)
    return float(np.median(took))
