"""Weights of rerank and fusion, chosen by what a score says of each choice."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kit.answers.retrieval import Part
from kit.rerank.landmark_country import Weights

Score = Callable[
    [Sequence[Part]], float
]  # larger is better; never of the reported half


def rerank_weights(part: Part, grid: Sequence[Weights], score: Score) -> Weights:
    """The weights of `grid` under which one model scores best; of equals the first."""
    return max(grid, key=lambda weights: score([replace(part, rerank=weights)]))


def fusion(parts: Sequence[Part], weights: Sequence[float], score: Score) -> list[Part]:
    """The first model and, one after the other, those that improve it, with their weights."""
    chosen = [parts[0]]
    for part in parts[1:]:
        trials = [[*chosen, replace(part, weight=weight)] for weight in weights]
        best = max(trials, key=score, default=chosen)
        if score(best) > score(chosen):
            chosen = best
    return chosen
