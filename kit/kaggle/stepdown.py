"""What an image costs, and the time left -> which scales and models to leave out during a run."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    models: tuple[str, ...]
    scales: tuple[float, ...]
    seconds: float  # that it takes, the rest included
    fits: bool
    statement: str  # one line for the log


def fewer(scales: Sequence[float]) -> list[tuple[float, ...]]:
    """`scales`, then with one less at a time: the farthest from 1 goes, of two the larger."""
    kept, ladder = list(scales), [tuple(scales)]
    while len(kept) > 1:
        kept.remove(max(kept, key=lambda s: (round(abs(math.log(s)), 2), s)))
        ladder.append(tuple(kept))
    return ladder


def plan(
    seconds: Mapping[str, Mapping[float, float]],
    images: int,
    left: float,
    *,
    rest: Sequence[float] = (),
    decode: float = 0.0,
    overlap: bool = True,
    done: int = 0,
    scales: Sequence[Sequence[float]] = (),
) -> Plan:
    """The smallest step down that fits: fewer scales first, then fewer models.

    seconds: model, scale -> of an image on the whole machine, the most important model first;
    the last one goes first. images: to extract; left: seconds; rest: of everything after
    extraction, with 1, 2, ... models; decode: seconds an image of the loader, beside the networks or (`overlap`
    False) in turn with them; done: images that all models at all scales have behind them,
    which counts only where the scales stay: embeddings are sums over them. scales: what may
    be looked at, dearest first (`fewer` of all); stored references must have the same ones.

    With all models every choice of scales is tried before a model goes, and so on. Where
    nothing fits it is the cheapest plan of all. Less time never gives a dearer one.
    """
    if not seconds or not all(seconds.values()):
        raise ValueError("no model or no scale to plan with")
    if not 0 <= done <= images:
        raise ValueError(f"{done} of {images} images are done")
    full = tuple(next(iter(seconds.values())))
    choices = [tuple(choice) for choice in scales] or fewer(full)
    for name, costs in seconds.items():
        lacking = sorted({*itertools.chain(full, *choices)} - costs.keys())
        if lacking or set(costs) != set(full):
            odd = lacking or sorted(set(costs) - set(full))
            raise ValueError(f"model {name}: scale {odd[0]:g} is not measured for all")
    names, offered = tuple(seconds), []
    for number in range(len(names), 0, -1):
        for choice in choices:
            taken = names[:number]
            network = sum(seconds[name][scale] for name in taken for scale in choice)
            each = max(decode, network) if overlap else decode + network
            todo = images - done * (set(choice) == set(full))
            after = rest[number - 1] if rest else 0.0
            offered.append((todo * each + after, taken, choice))
    fits = [each for each in offered if each[0] <= left]
    cost, taken, choice = fits[0] if fits else min(offered, key=lambda each: each[0])
    said = _statement(offered[0], (cost, taken, choice), left, bool(fits))
    return Plan(taken, choice, cost, bool(fits), said)


Offer = tuple[float, tuple[str, ...], tuple[float, ...]]


def _statement(first: Offer, taken: Offer, left: float, fits: bool) -> str:
    cost, names, scales = taken
    shown = f"{', '.join(names)} at {'scales' if len(scales) > 1 else 'scale'} "
    shown += ", ".join(f"{scale:g}" for scale in scales)
    times = f"{cost / 3600:.2f} h of the {left / 3600:.2f} h left"
    if not fits:
        return f"nothing fits: even {shown} takes {times}"
    if taken[1:] == first[1:]:
        return f"all of it fits: {shown} takes {times}"
    gone = [name for name in first[1] if name not in names]
    dropped = [f"scale {s:g}" for s in first[2] if s not in scales] + gone
    return (
        f"the whole plan takes {first[0] / 3600:.2f} h: without {', '.join(dropped)} it "
        f"takes {times} ({shown})"
    )
