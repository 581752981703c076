from kit.answers import tuning
from kit.answers.retrieval import Part
from kit.rerank.landmark_country import Weights


def part(name: str) -> Part:
    return Part(query=name, index=name)


def worth(chosen) -> float:
    """A made-up score: b at weight 0.5 helps a, c never does."""
    gains = {("b", 0.5): 0.2, ("b", 1.0): 0.1, ("c", 0.5): -0.1, ("c", 1.0): 0.0}
    return sum(gains.get((each.query, each.weight), 0) for each in chosen[1:])


def test_a_model_joins_at_its_best_weight_and_only_if_it_helps():
    chosen = tuning.fusion([part("a"), part("b"), part("c")], [0.5, 1.0], worth)
    assert [(each.query, each.weight) for each in chosen] == [("a", 1.0), ("b", 0.5)]
    assert tuning.fusion([part("a"), part("b")], [], worth) == [part("a")]


def test_the_best_weights_of_the_grid_are_chosen_and_of_equals_the_first():
    grid = [Weights(0.0, 0.0), Weights(0.2, 0.0), Weights(0.2, 0.1), Weights(1.0, 0.0)]
    best = tuning.rerank_weights(
        part("a"), grid, lambda chosen: -abs(chosen[0].rerank.landmark - 0.2)
    )
    assert best == grid[1]
