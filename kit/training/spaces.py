"""Spaces of stage fields -> points: a whole grid, or draws that every node and run repeats."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from kit import config, files
from kit.training.job import Stage, change

# field of Stage -> its choices, or a range: low, high and one of SCALES
Space = Mapping[str, Sequence[Any]]
SCALES = ("linear", "log", "int")  # int: whole numbers, both ends included


class Point(NamedTuple):
    """A place in a space: the fields that change, and the stage that this gives."""

    fields: dict[str, Any]
    space: Space
    stage: Stage
    key: str  # the stage's fingerprint


def points(
    spaces: Space | Sequence[Space], stage: Stage, trials: int = 0, seed: int = 0
) -> list[Point]:
    """The whole grid of every space, in order; or `trials` points drawn from each.

    Draws are a function of the spaces and the seed, and more trials only add to them.
    From choices alone no point is drawn twice. Points that give the same stage are one.
    """
    spaces = [spaces] if isinstance(spaces, Mapping) else list(spaces)
    if not spaces:
        raise ValueError("no space to search; name fields of Stage and their choices")
    if trials < 0:
        raise ValueError(f"trials is {trials}, not at least 0")
    found: dict[str, Point] = {}
    for number, space in enumerate(spaces):
        _check(space, trials)
        for fields in _fields(space, trials, (seed, number)):
            changed = change(stage, **fields)
            key = files.fingerprint(config.to_dict(changed))
            found.setdefault(key, Point(fields, space, changed, key))
    return list(found.values())


def is_range(axis: Sequence[Any]) -> bool:
    """Whether it is low, high and a scale; else it is a list of choices."""
    numbers = all(isinstance(each, Real) for each in axis[:2])
    return len(axis) == 3 and numbers and axis[2] in SCALES


def _check(space: Space, trials: int) -> None:
    if not space:
        raise ValueError("a space is empty; name fields of Stage and their choices")
    for name, axis in space.items():
        if name in ("name", "seed"):
            raise ValueError(f"{name} cannot be searched; seeds are averaged over")
        if isinstance(axis, str) or not isinstance(axis, Sequence) or not axis:
            raise ValueError(f"{name}: {axis!r} is no list of choices and no range")
        if not is_range(axis):
            continue
        low, high, scale = axis
        whole = scale != "int" or (low == int(low) and high == int(high))
        if not (low < high and whole and (scale != "log" or low > 0)):
            raise ValueError(f"{name}: {low} to {high} cannot be a range of {scale}")
        if not trials:
            raise ValueError(f"{name} is a range: say how many trials to draw")


def _fields(
    space: Space, trials: int, seed: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    if any(map(is_range, space.values())):
        for number in range(trials):
            rng = np.random.default_rng([*seed, number])
            yield {name: _draw(axis, rng) for name, axis in space.items()}
        return
    grid = list(itertools.product(*space.values()))
    rows: Sequence[int] = range(len(grid))
    if trials:
        rows = np.random.default_rng(seed).permutation(len(grid))[:trials]
    for row in rows:
        yield dict(zip(space, grid[row], strict=True))


def _draw(axis: Sequence[Any], rng: np.random.Generator) -> Any:
    if not is_range(axis):
        return axis[rng.integers(len(axis))]
    low, high, scale = axis
    if scale == "int":
        return int(rng.integers(int(low), int(high) + 1))
    if scale == "log":
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(value, low), high)  # the logarithm rounds
    return float(rng.uniform(low, high))
