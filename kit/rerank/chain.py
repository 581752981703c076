"""chain.json: which models answer, with what weight, and how their scores are reranked."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from kit import files
from kit.rerank.landmark_country import PUBLISHED, Weights


@dataclass(frozen=True)
class Chain:
    """What a tuning notebook decides and a submission follows."""

    models: dict[str, float]  # folder of features -> weight of its scores in the sum
    votes: int = 3  # references that vote for a query's landmark and country
    weights: Weights = PUBLISHED

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a chain needs at least one model")
        if self.votes < 1:
            raise ValueError(f"votes is {self.votes}; at least one reference must vote")
        given = [*self.models.values(), self.weights.landmark, self.weights.country]
        wrong = [weight for weight in given if not 0 <= weight < math.inf]
        if wrong:
            raise ValueError(
                f"a weight of the chain is {wrong[0]}; weights are not negative"
            )


def save(chain: Chain, path: Path) -> Path:
    return files.write_json(path, asdict(chain))


def load(path: Path) -> Chain:
    if not path.exists():
        raise FileNotFoundError(f"no chain {path}; run 04_tune_rerank first")
    values = files.read_json(path)
    try:
        return Chain(**{**values, "weights": Weights(**values["weights"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a chain ({error})") from None
