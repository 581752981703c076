"""recognition.json: which models recognise, and the named steps that make them sure.

{"models": {"c2x": 1.0, "clean": 0.5}, "fusion": "scores",
 "steps": [{"step": "vote", "votes": 3}, {"step": "inliers"}, {"step": "frequent", "most": 30}]}

The first step is the vote; steps come in the order of STEPS, each once. A step marked * reads the
whole batch of queries: with other queries beside it a query is answered otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kit import files
from kit.rerank import steps
from kit.rerank.sort_insert import WORTHS
from kit.rerank.steps import Step

VOTE, CONFIDENCE, BATCH = "vote", "confidence", "batch"
# scores: weighted sums of the models' scores find the references
# votes: each model's own nearest references vote together (2020)
# ranks: each model answers, and the places of its confidences are summed; reads the whole batch
FUSIONS = ("scores", "votes", "ranks")


@dataclass(frozen=True)
class Vote(
    Step,
    name="vote",
    kind=VOTE,
    least={"votes": 1},
    largest={"votes": 1_000},
    choices={"worth": tuple(WORTHS)},
):
    """The nearest references vote for their landmarks (kit.rerank.recognition)."""

    votes: int = 3
    worth: str = "distance_sum"


@dataclass(frozen=True)
class NonLandmark(
    Step,
    name="non_landmark",
    kind=VOTE,
    least={"references": 0, "queries": 0, "reference_near": 1, "query_near": 1},
):
    """References and queries near images without a landmark count for less (2020, A - B and - C).

    B is a reference's mean cosine to the nearest such images: references are ranked by their cosine
    less `references` times B, and their votes are worth less by as much. C is that of a query, whose
    confidence is less by `queries` times C.
    """

    references: float = 1.0
    queries: float = 1.0
    images: str = "index"  # the list whose images without a label are those
    reference_near: int = 5
    query_near: int = 10


@dataclass(frozen=True)
class Inliers(
    Step,
    name="inliers",
    kind=VOTE,
    least={"weight": 0, "most": 1, "least_inliers": 0, "side": 32},
    largest={"side": 16_384},
):
    """A vote is worth more where local features confirm it (kit.rerank.local)."""

    weight: float = 1.0
    most: int = 70  # inliers that count
    least_inliers: int = 0  # fewer count as none
    backend: str = "sift"
    side: int = 800  # longest side of the pictures, pixels


@dataclass(frozen=True)
class Background(
    Step, name="background", kind=CONFIDENCE, least={"weight": 0, "near": 1}
):
    """A confidence is less by how near other landmarks' references come to the query."""

    weight: float = 1.0
    near: int = 50  # references looked at, the voting ones included


@dataclass(frozen=True)
class Probability(
    Step,
    name="probability",
    kind=CONFIDENCE,
    least={"offset": -1e15},
    largest={"slope": 1e15, "offset": 1e15},
):
    """Confidences as chances of being right; the order stays (Platt, 1999)."""

    slope: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slope <= 0:
            raise ValueError(f"step probability: slope is {self.slope}, not above 0")


@dataclass(frozen=True)
class Frequent(Step, name="frequent", kind=BATCH, least={"most": 1, "within": 0}):
    """* Landmarks predicted more often than `most` come last, the most frequent one very last.

    within: of d^2; queries that near to one of theirs have confidence 0. 0 spreads nothing.
    """

    most: int = 30
    within: float = 0.0  # 0.5 was tried in 2019


STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (Vote, NonLandmark, Inliers, Background, Probability, Frequent)
}
NAMES = tuple(STEPS)


@dataclass(frozen=True)
class Recogniser:
    """What 07_recognition decides and a submission follows."""

    models: Mapping[str, float]  # folder of features -> weight
    steps: tuple[Step, ...] = (Vote(),)
    fusion: str = "scores"

    def __post_init__(self) -> None:
        steps.check_models(self.models)
        if self.fusion not in FUSIONS:
            listed = ", ".join(FUSIONS)
            raise ValueError(f"fusion {self.fusion!r} is not one of {listed}")
        names = [step.name for step in self.steps]
        known = [name for name in NAMES if name in names]
        if names != known or NAMES[0] not in names:
            raise ValueError(
                f"steps {', '.join(names) or 'none'}: the order is {', '.join(NAMES)}, each "
                "once at most, and vote must be there"
            )

    def __str__(self) -> str:
        models = ", ".join(f"{name} {weight:g}" for name, weight in self.models.items())
        return "; ".join([models, *map(str, self.steps)])

    def step(self, name: str) -> Any:
        """The step of that name; None where it is not taken."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def votes(self) -> int:
        return self.step("vote").votes

    @property
    def batch(self) -> bool:
        """Whether a query's answer depends on the other queries."""
        ranks = self.fusion == "ranks" and len(self.models) > 1
        return ranks or any(step.kind == BATCH for step in self.steps)


def published(name: str, images: str = NonLandmark.images) -> Step:
    """A step with its published parameters; images: the list of those without a landmark."""
    step = steps.build({"step": name}, STEPS)
    return replace(step, images=images) if isinstance(step, NonLandmark) else step


def with_step(plan: Recogniser, step: Step) -> Recogniser:
    """The recogniser with one more step, at its place, or with it instead of its namesake."""
    taken = {each.name: each for each in plan.steps} | {step.name: step}
    ordered = tuple(taken[name] for name in NAMES if name in taken)
    return replace(plan, steps=ordered)


def without(plan: Recogniser, name: str) -> Recogniser:
    """The recogniser with one step less."""
    return replace(plan, steps=tuple(s for s in plan.steps if s.name != name))


def ablations(plan: Recogniser) -> dict[str, Recogniser]:
    """The recogniser without each of its steps but the vote, by that step's name."""
    return {step.name: without(plan, step.name) for step in plan.steps[1:]}


def save(plan: Recogniser, path: Path) -> Path:
    return files.write_json(
        path,
        {
            "models": dict(plan.models),
            "fusion": plan.fusion,
            "steps": [step.to_dict() for step in plan.steps],
        },
    )


def load(path: Path) -> Recogniser:
    if not path.exists():
        raise FileNotFoundError(f"no {path}; run 07_recognition first")
    try:
        return build(files.read_json(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no recogniser ({error})") from None


def build(values: Mapping[str, Any]) -> Recogniser:
    """The recogniser that JSON holds."""
    return steps.planned(Recogniser, values, STEPS)
