"""A chain's steps at work: what each reads is searched for here, what it does is in kit.rerank.

kit.answers.moves      features -> features, before the search
kit.answers.bonuses    what is added to the scores inside it
kit.answers.rankings   rankings -> rankings, after it
"""

from collections.abc import Sequence

from kit.answers.bonuses import gain
from kit.answers.moves import move
from kit.answers.rankings import order
from kit.answers.scene import INDEX, QUERY, Scene
from kit.features.search import Neighbours
from kit.rerank import fusion, steps, sums
from kit.rerank.addends import Addends
from kit.rerank.chain import Chain


def rank(scene: Scene, chain: Chain) -> Neighbours:
    """Scores (Q, k) and index rows (Q, k), best first, after all steps of the chain.

    An image that could not be read is in no ranking; where nothing is left the row is -1.
    """
    models = [_moved(each, chain.of(steps.FEATURES)) for each in scene.each()]
    whole = scene.of_models(models)
    rankings = chain.of(steps.RANKING)
    width = max(chain.k, *(getattr(step, "shortlist", 0) for step in rankings), 0)
    if chain.fusion == "ranks" and len(models) > 1:
        found = [_searched([one], one, chain, width).rows for one in models]
        best = Neighbours(*fusion.rrf(found, width, scene.weights))
    else:
        best = _searched(models, whole, chain, width)
    for step in rankings:
        best = Neighbours(*order(step, whole, *best))
    return Neighbours(best.scores[:, : chain.k], best.rows[:, : chain.k])


def _moved(scene: Scene, moves: Sequence[steps.Step]) -> Scene:
    """The scene after some moves; those that the chain before began with are not made again."""
    path = scene.path
    for number, step in enumerate(moves):
        if number == len(path) or path[number][0] != step:
            del path[number:]
            path.append((step, move(step, scene)))
        scene = path[number][1]
    return scene


def _searched(
    models: Sequence[Scene], whole: Scene, chain: Chain, k: int
) -> Neighbours:
    """Exact search with the bonuses of each model, or of the sum of all."""
    bonuses = chain.of(steps.BONUS)
    if not bonuses:
        return whole.near(QUERY, INDEX, k)
    if chain.fusion == "tags":
        total = sums.weighted_sum([_total(whole, bonuses)], [sum(whole.weights)])
    else:
        parts = [_total(each, bonuses) for each in models]
        total = sums.weighted_sum(parts, whole.weights)
    return whole.near(QUERY, INDEX, k, total)


def _total(scene: Scene, bonuses: Sequence[steps.Step]) -> Addends:
    parts = [gain(step, scene) for step in bonuses]
    return sums.weighted_sum(parts, [1.0] * len(parts))
