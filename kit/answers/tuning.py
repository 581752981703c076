"""Parameters of a chain's steps and weights of its models, chosen by what a score says of each.

A score is of the half that may be chosen by, never of the one that is reported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from kit import config
from kit.rerank.chain import Chain
from kit.rerank.steps import STEPS, Step

Plan = TypeVar(
    "Plan"
)  # a chain or a recogniser: models, and steps of which one is added
Score = Callable[[Plan], float]  # larger is better
Axis = tuple[float, float] | tuple[int, int]  # low, high; whole numbers stay whole

# what is worth searching, by step and field; the other fields stay as they are
SPACES: Mapping[str, Mapping[str, Axis]] = {
    "whitening": {"ridge": (1e-3, 1.0)},
    "dba": {"neighbours": (2, 30)},
    "alpha_qe": {"neighbours": (1, 30), "alpha": (0.0, 6.0)},
    "smoothing": {"neighbours": (2, 20), "beta": (0.05, 0.5), "iterations": (1, 3)},
    "verified_qe": {"most": (1, 8), "least_inliers": (10, 90)},
    "verified_dba": {"most": (1, 8), "least_inliers": (10, 90)},
    "landmark_country": {
        "landmark": (0.0, 1.0),
        "country": (0.0, 0.2),
        "votes": (1, 10),
        "confidence": (0.0, 0.8),
    },
    "soft_labels": {"weight": (0.0, 1.0), "votes": (1, 10), "confidence": (0.0, 0.8)},
    "same_label": {"same": (0.0, 1.0), "other": (0.0, 0.2), "votes": (1, 10)},
    "sort_insert": {"votes": (1, 10), "above": (0.2, 1.8), "at_least": (0.0, 0.9)},
    "category_expansion": {"votes": (1, 5), "above": (0.3, 0.9)},
    "k_reciprocal": {"k1": (5, 40), "k2": (1, 10), "share": (0.1, 0.9)},
    "diffusion": {"kd": (5, 50), "kq": (1, 20), "gamma": (1.0, 5.0)},
    "refine": {"neighbours": (1, 20), "beta": (0.0, 1.0)},
    "local": {
        "top": (5, 100),  # on flat scores depth decides
        "weight": (0.0, 1.0),
        "most": (10, 100),
        "least_inliers": (0, 20),
    },
    # of recognition
    "vote": {"votes": (1, 10)},
    "non_landmark": {"references": (0.0, 1.5), "queries": (0.0, 1.5)},
    "inliers": {"weight": (0.0, 2.0), "most": (10, 100), "least_inliers": (0, 20)},
    "background": {"weight": (0.0, 3.0), "near": (5, 100)},
    "frequent": {"most": (10, 100), "within": (0.0, 0.8)},
}


def refuse_empty_half(solution: pd.DataFrame, source: Path) -> None:
    """Raise ValueError where a half of a table of `read_solution` has no query that counts.

    One half chooses and the other reports, so tuning needs both. A query counts if it has a right
    answer and is not Ignored.
    """
    halves = solution.loc[solution["images"].str.strip() != "", "usage"]
    public, private = (int((halves == name).sum()) for name in ("Public", "Private"))
    if not public or not private:
        raise ValueError(
            f"{source}: no query of the {'Private' if public else 'Public'} half counts (Public "
            f"{public}, Private {private}, of {len(solution)} queries); tuning chooses by the "
            "Public half and reports the Private one: give both queries with right answers in "
            "the index"
        )


def tuned(
    chain: Plan,
    step: Step,
    score: Score[Plan],
    trials: int,
    seed: int = 0,
    join: Callable[[Plan, Step], Plan] | None = None,
) -> Step:
    """`step` with the fields under which the chain that it ends scores best.

    The step as it is given is the first trial and wins ties; the others are Optuna's TPE. Further
    trials only add to earlier ones. join: how a step is added, by default at the end of its kind.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    join = join or with_step
    space = SPACES.get(step.name, {})
    if not space or trials < 2:
        return step
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8),
    )
    near = {  # the step itself may lie outside of the space
        name: min(max(getattr(step, name), low), high)
        for name, (low, high) in space.items()
    }
    study.enqueue_trial(near)

    def objective(trial: optuna.Trial) -> float:
        return _measured(score, join(chain, _suggested(trial, step, space)))

    study.optimize(objective, n_trials=trials)
    found = _suggested(optuna.trial.FixedTrial(study.best_params), step, space)
    published = _measured(score, join(chain, step))
    return found if study.best_value > published else step


def with_step(chain: Chain, step: Step) -> Chain:
    """The chain with one more step, at the end of its kind."""
    steps = [*chain.steps, step]
    kinds = list(dict.fromkeys(each.kind for each in STEPS.values()))
    return replace(chain, steps=tuple(sorted(steps, key=lambda s: kinds.index(s.kind))))


def with_steps(chain: Chain, steps: Sequence[Step]) -> Chain:
    """The chain with more steps, each at the end of its kind."""
    return reduce(with_step, steps, chain)


def fused(
    chain: Plan, models: Sequence[str], weights: Sequence[float], score: Score[Plan]
) -> Plan:
    """The chain and, one after the other, those of `models` that improve it, with their weights."""
    if not models or not weights:
        return chain
    best, value = chain, _measured(score, chain)
    for model in models:
        before = best
        for weight in weights:
            trial = replace(before, models={**before.models, model: weight})
            reached = _measured(score, trial)
            if reached > value:
                best, value = trial, reached
    return best


def _measured(score: Score[Plan], plan: Plan) -> float:
    """The score of a plan, or ValueError where it is NaN: nothing can be chosen by that."""
    value = score(plan)
    if math.isnan(value):
        raise ValueError(
            f"the score of {plan} is not a number: no query counts in the half of the queries "
            "that it is measured on; give that half queries with right answers"
        )
    return value


def _suggested(trial: Any, step: Step, space: Mapping[str, Axis]) -> Step:
    """Three digits after the point are more than any half of the queries can tell."""
    chosen = {
        name: (
            trial.suggest_int(name, *axis)
            if isinstance(axis[0], int)
            else round(trial.suggest_float(name, *axis), 3)
        )
        for name, axis in space.items()
    }
    return config.change(step, **chosen)
