"""chain.json: which models answer, and the named steps that rerank what they find.

{"models": {"c2x": 1.0, "clean": 0.5}, "fusion": "scores", "k": 100,
 "steps": [{"step": "alpha_qe", "neighbours": 10}, {"step": "landmark_country", "landmark": 0.2}]}

A step is of one of three kinds, and a chain has them in this order:

    features     vectors -> vectors, of each model
    bonus        tags -> what is added to the scores, inside the search
    ranking      rows and scores of a shortlist -> the same, in a better order
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kit import files
from kit.rerank import steps
from kit.rerank.steps import Step

KINDS = (steps.FEATURES, steps.BONUS, steps.RANKING)
FUSIONS = ("scores", "tags", "ranks")
# steps with fixed parameters under one name: nothing in them is tuned
NAMED: Mapping[str, tuple[Step, ...]] = {
    # places with one to ten photographs each, where the published counts of neighbors cover
    # images of other places
    "small-places": (steps.Dba(neighbours=3), steps.Local(backend="xfeat")),
}


@dataclass(frozen=True)
class Chain:
    """What a tuning notebook decides and a submission follows."""

    models: Mapping[str, float]  # folder of features -> weight of its scores in the sum
    steps: tuple[Step, ...] = ()
    # scores: each model's scores and its own tags' bonus are summed (2021, before fusion)
    # tags: scores are summed, and the sum finds the tags (2021, after fusion)
    # ranks: each model's ranking counts by its places (reciprocal rank fusion)
    fusion: str = "scores"
    k: int = 100  # places of a ranking

    def __post_init__(self) -> None:
        steps.check_models(self.models)
        if self.fusion not in FUSIONS:
            listed = ", ".join(FUSIONS)
            raise ValueError(f"fusion {self.fusion!r} is not one of {listed}")
        whole = isinstance(self.k, int) and not isinstance(self.k, bool)
        if not whole or not 1 <= self.k <= steps.LARGEST[int]:
            raise ValueError(
                f"k is {self.k!r:.50}; a ranking has 1 to {steps.LARGEST[int]} places"
            )
        refuse_order(self.steps)

    def __str__(self) -> str:
        models = ", ".join(f"{name} {weight:g}" for name, weight in self.models.items())
        return "; ".join([models, *map(str, self.steps)])

    def of(self, kind: str) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.kind == kind)


def wide_steps(chosen: Sequence[Step], index: int) -> list[str]:
    """A sentence for each step that averages over a tenth or more of an index of so many images.

    Such a step mixes places: the published counts are for indexes of hundreds of thousands.
    """
    counts = [
        (step.name, name, getattr(step, name))
        for step in chosen
        for name in ("neighbours", "kd", "explore", "k1")
        if hasattr(step, name)
    ]
    return [
        f"{step}: {name} {count} covers {min(1.0, count / index):.0%} of the index's {index} "
        "images; take fewer, or small-places"
        for step, name, count in counts
        if count > 3 and 10 * count >= index
    ]


def warn_of_wide_steps(names: Sequence[str], index: int) -> None:
    """Print a line for each of the steps, as they are published, that `wide_steps` names."""
    known = [NAMED.get(name) or (steps.build({"step": name}),) for name in names]
    for line in wide_steps([step for chain in known for step in chain], index):
        print(line)


def refuse_order(chosen: Sequence[Step]) -> None:
    """Features first, then bonuses, then rankings; within a kind any order."""
    for before, after in pairwise(chosen):
        if KINDS.index(before.kind) > KINDS.index(after.kind):
            raise ValueError(
                f"step {after.name} ({after.kind}) comes after {before.name} "
                f"({before.kind}); the order is {', '.join(KINDS)}"
            )


def save(chain: Chain, path: Path) -> Path:
    return files.write_json(
        path,
        {
            "models": dict(chain.models),
            "fusion": chain.fusion,
            "k": chain.k,
            "steps": [step.to_dict() for step in chain.steps],
        },
    )


def load(path: Path) -> Chain:
    if not path.exists():
        raise FileNotFoundError(f"no chain {path}; run 04_tune_rerank first")
    try:
        return build(files.read_json(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a chain ({error})") from None


def build(values: Mapping[str, Any]) -> Chain:
    """The chain that JSON holds."""
    return steps.planned(Chain, values)
