"""The steps that a chain may name, with their parameters; published ones are the defaults.

What a step does lives in the module that its docstring names; kit.answers.reranking brings it the
neighbours, labels and pictures that it reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from kit import config

Plan = TypeVar("Plan")
# of a field whose step names no other: numbers beyond them are mistakes, or take for ever
LARGEST = {int: 100_000, float: 1e6}
LONGEST = 32  # steps of a chain
FEATURES, BONUS, RANKING = "features", "bonus", "ranking"


@dataclass(frozen=True)
class Step:
    """Equal parameters give equal results."""

    name: ClassVar[str]
    kind: ClassVar[str]
    least: ClassVar[Mapping[str, float]]
    largest: ClassVar[Mapping[str, float]]
    below: ClassVar[Mapping[str, float]]
    choices: ClassVar[Mapping[str, Sequence[str]]]

    def __init_subclass__(
        cls,
        name: str,
        kind: str,
        least: Mapping[str, float] | None = None,
        largest: Mapping[str, float] | None = None,
        below: Mapping[str, float] | None = None,
        choices: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        cls.name, cls.kind, cls.choices = name, kind, choices or {}
        cls.least, cls.largest, cls.below = least or {}, largest or {}, below or {}

    def __post_init__(self) -> None:
        bounds = {
            each.name: LARGEST[each.type]
            for each in fields(self)
            if each.type in LARGEST
        }
        config.check(
            self,
            f"step {self.name}",
            least={name: -value for name, value in bounds.items()} | dict(self.least),
            most=bounds | dict(self.largest),
            below=self.below,
            choices=self.choices,
        )

    def __str__(self) -> str:
        changed = [
            f"{each.name} {getattr(self, each.name)}"
            for each in fields(self)
            if getattr(self, each.name) != each.default
        ]
        return " ".join([self.name, ", ".join(changed)]).strip()

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.name, **config.to_dict(self)}


# --- features -> features -----------------------------------------------------------------------


@dataclass(frozen=True)
class Whitening(Step, name="whitening", kind=FEATURES, least={"dim": 0, "ridge": 0}):
    """Learned linear whitening of queries, index and references (kit.rerank.whitening)."""

    dim: int = 0  # 0: all
    ridge: float = 1e-3
    supervised: bool = True  # by the references' landmarks; else PCA of the index


@dataclass(frozen=True)
class Dba(
    Step,
    name="dba",
    kind=FEATURES,
    least={"neighbours": 2, "alpha": 0},
    largest={"alpha": 100},
    choices={"weigh": ("equal", "decaying", "powered")},
):
    """Index images moved towards their neighbours (kit.rerank.expansion)."""

    neighbours: int = 10  # the image itself is one
    weigh: str = "decaying"
    alpha: float = 3.0  # of powered
    supervised: bool = False  # only neighbours of the image's own predicted landmark


@dataclass(frozen=True)
class AlphaQe(
    Step,
    name="alpha_qe",
    kind=FEATURES,
    least={"neighbours": 1, "alpha": 0},
    largest={"alpha": 100},
):
    """Queries moved towards their nearest index images (kit.rerank.expansion)."""

    neighbours: int = 10
    alpha: float = 3.0
    transductive: bool = False  # other queries are neighbours, too (2019)


@dataclass(frozen=True)
class Smoothing(
    Step,
    name="smoothing",
    kind=FEATURES,
    least={"neighbours": 1, "beta": 1e-6, "iterations": 1},
    largest={"iterations": 100},
):
    """Index images averaged over their neighbours (kit.rerank.smoothing)."""

    neighbours: int = 5
    beta: float = 0.2
    iterations: int = 2
    transductive: bool = False  # queries too, and they are neighbours (2021)


@dataclass(frozen=True)
class VerifiedQe(
    Step,
    name="verified_qe",
    kind=FEATURES,
    least={"shortlist": 1, "most": 1, "least_inliers": 1, "side": 32},
    largest={"side": 16_384},
):
    """Queries moved towards index images that local features confirm (kit.rerank.expansion)."""

    shortlist: int = 100  # nearest index images that are verified
    most: int = 5
    least_inliers: int = 90  # fewer count as none
    backend: str = "sift"
    side: int = 800  # longest side of the pictures, pixels


@dataclass(frozen=True)
class VerifiedDba(
    Step,
    name="verified_dba",
    kind=FEATURES,
    least={"shortlist": 2, "most": 1, "least_inliers": 1, "side": 32},
    largest={"side": 16_384},
):
    """Index images moved towards others that local features confirm (kit.rerank.expansion)."""

    shortlist: int = (
        101  # nearest index images that are verified; the image itself is one
    )
    most: int = 5
    least_inliers: int = 90  # fewer count as none
    backend: str = "sift"
    side: int = 800  # longest side of the pictures, pixels


# --- score bonus --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LandmarkCountry(
    Step,
    name="landmark_country",
    kind=BONUS,
    least={"landmark": 0, "country": 0, "votes": 1, "confidence": 0},
    largest={"votes": 1_000, "confidence": 1},
    choices={
        "query_tags": ("cosine", "k_reciprocal", "class_mean"),
        "index_tags": ("single", "average"),
    },
):
    """Index images of the landmarks and countries that the query's neighbours vote for
    (kit.rerank.landmark_country).
    """

    landmark: float = 1.0
    country: float = 0.1
    votes: int = 3
    query_tags: str = "cosine"
    index_tags: str = "single"
    confidence: float = (
        0.0  # a query whose first label has a smaller share is left alone
    )


@dataclass(frozen=True)
class SoftLabels(
    Step,
    name="soft_labels",
    kind=BONUS,
    least={"weight": 0, "votes": 1, "confidence": 0},
    largest={"votes": 1_000, "confidence": 1},
):
    """The share of votes that a query and an index image have in common, label by label."""

    weight: float = 1.0
    votes: int = 5
    confidence: float = 0.0


@dataclass(frozen=True)
class SameLabel(
    Step,
    name="same_label",
    kind=BONUS,
    least={"same": 0, "other": 0, "votes": 1},
    largest={"votes": 1_000},
):
    """The index image's cosine to its nearest reference is added where both have one label, and a
    part of it is taken away elsewhere (1st place of Google Landmark Retrieval 2021).
    """

    same: float = 1.0
    other: float = 0.1
    votes: int = 3


# --- ranking -> ranking -------------------------------------------------------------------------


@dataclass(frozen=True)
class SortInsert(
    Step,
    name="sort_insert",
    kind=RANKING,
    least={"votes": 1},
    largest={"votes": 1_000},
    choices={"worth": ("cosine_mean", "cosine_sum", "distance_sum")},
):
    """Images of the query's predicted landmark first, those not found yet too
    (kit.rerank.sort_insert).
    """

    votes: int = 3
    worth: str = "cosine_mean"
    above: float = 0.6
    at_least: float = -1.0  # a query of a smaller score is left alone


@dataclass(frozen=True)
class Category(
    Step, name="category", kind=RANKING, least={"votes": 1}, largest={"votes": 1_000}
):
    """All index images of the query's majority landmark first (kit.rerank.category)."""

    votes: int = 3


@dataclass(frozen=True)
class CategoryExpansion(
    Step,
    name="category_expansion",
    kind=RANKING,
    least={"votes": 1},
    largest={"votes": 1_000},
):
    """Index images of the landmarks of the nearest references, where those are close enough."""

    votes: int = 3
    above: float = 0.6


@dataclass(frozen=True)
class KReciprocal(
    Step,
    name="k_reciprocal",
    kind=RANKING,
    least={"k1": 1, "k2": 1, "share": 0, "shortlist": 1},
    largest={"k1": 10_000, "k2": 10_000, "share": 1},
):
    """Full k-reciprocal re-ranking (kit.rerank.k_reciprocal); other queries are neighbours."""

    k1: int = 20
    k2: int = 6
    share: float = 0.3  # of the plain distance
    shortlist: int = 1000


@dataclass(frozen=True)
class Diffusion(
    Step,
    name="diffusion",
    kind=RANKING,
    least={"kd": 1, "kq": 1, "gamma": 0, "alpha": 0, "shortlist": 1},
    largest={"kd": 10_000, "gamma": 100},
    below={"alpha": 1},
):
    """Heat from the first neighbours over the graph of the index (kit.rerank.diffusion)."""

    kd: int = 50
    kq: int = 10
    gamma: float = 3.0
    alpha: float = 0.99
    shortlist: int = 1000


@dataclass(frozen=True)
class Traversal(Step, name="traversal", kind=RANKING, least={"explore": 1}):
    """Explore-exploit walk over the graph of the index (kit.rerank.traversal)."""

    explore: int = 100
    tau: float = 10.0  # above every cosine: each retrieved image is explored at once


@dataclass(frozen=True)
class Refine(
    Step,
    name="refine",
    kind=RANKING,
    least={"neighbours": 1, "beta": 0, "shortlist": 1},
):
    """Query and shortlist refined by each other (kit.rerank.refine)."""

    neighbours: int = 9
    beta: float = 0.15
    shortlist: int = 400


@dataclass(frozen=True)
class Local(
    Step,
    name="local",
    kind=RANKING,
    least={"top": 1, "weight": 0, "most": 1, "least_inliers": 0, "side": 32},
    largest={"side": 16_384},
):
    """Inliers of the first images, verified by local features (kit.rerank.local)."""

    backend: str = "sift"
    top: int = 10
    weight: float = 0.15
    most: int = 90  # inliers that count
    least_inliers: int = 0  # fewer count as none
    side: int = 800  # longest side of the pictures, pixels


STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        *(Whitening, Dba, AlphaQe, Smoothing, VerifiedQe, VerifiedDba),
        *(LandmarkCountry, SoftLabels, SameLabel),
        *(SortInsert, Category, CategoryExpansion),
        *(KReciprocal, Diffusion, Traversal, Refine, Local),
    )
}


def build(values: Mapping[str, Any], among: Mapping[str, type[Step]] = STEPS) -> Step:
    """{"step": name, ...} as JSON has it -> the step; unknown names are refused with a list."""
    if not isinstance(values, Mapping):
        raise TypeError(f"a step is {values!r:.50}, not an object with its name")
    given = dict(values)
    name = given.pop("step", None)
    if name not in among:
        raise ValueError(f"step {name!r} is not one of {', '.join(among)}")
    try:
        return config.from_dict(among[name], given)
    except ValueError as error:
        said = str(error)
        known = ", ".join(each.name for each in fields(among[name]))
        if "has no field" in said:
            said = (
                f"step {name}{said.removeprefix(among[name].__name__)}; fields: {known}"
            )
        raise ValueError(said) from None


def planned(
    kind: type[Plan], values: Any, among: Mapping[str, type[Step]] = STEPS
) -> Plan:
    """A chain or a recogniser, a dataclass with `models` and `steps`, as JSON has it."""
    known = [each.name for each in fields(kind)]
    if not isinstance(values, Mapping) or "models" not in values:
        raise ValueError(
            f"it has fields {', '.join(known)}, of which models must be there"
        )
    for name in values:
        if name not in known:
            raise ValueError(f"no field {name!r}; fields: {', '.join(known)}")
    taken = dict(values)
    check_models(taken["models"])
    if "steps" in taken:
        if not isinstance(taken["steps"], list | tuple):
            raise TypeError(f"steps is {taken['steps']!r:.50}, not a list")
        if len(taken["steps"]) > LONGEST:
            raise ValueError(f"{len(taken['steps'])} steps, more than {LONGEST}")
        taken["steps"] = tuple(build(each, among) for each in taken["steps"])
    return kind(**taken)


def check_models(models: Any) -> None:
    """Refuses weights by model that are not numbers of at least 0, or all 0."""
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            f"models is {models!r:.50}; name at least one, with its weight"
        )
    for model, weight in models.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= LARGEST[float]:
            raise ValueError(
                f"the weight of model {model} is {weight!r:.50}; weights are numbers of 0 "
                f"to {LARGEST[float]:g}"
            )
    if not any(models.values()):
        raise ValueError(f"all weights of models {', '.join(models)} are 0")
