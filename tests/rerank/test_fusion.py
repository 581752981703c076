import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kit.rerank import order
from kit.rerank.fusion import concatenate, min_max, rrf, weighted_sum, z_score


def units(count, dim, seed):
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=random), dim=1)


def rankings(models=3, queries=40, index=30, k=10):
    """Rankings of different lengths with ties; some places are absent."""
    random = torch.Generator().manual_seed(models)
    scores, rows = [], []
    for model in range(models):
        width = k + 3 * model
        at = torch.stack(
            [torch.randperm(index, generator=random)[:width] for _ in range(queries)]
        )
        values = torch.randint(-8, 9, (queries, width), generator=random) / 8
        values[::4, -2:], at[::4, -2:] = -torch.inf, -1
        values[1::4, -1] = -torch.inf  # unreadable, but named
        ranking = order.sort(values, at)
        scores.append(ranking[0])
        rows.append(ranking[1])
    return scores, rows


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.5, 2, 0], [0.25, 1, 1, 0.25]])
def test_concatenation_is_the_weighted_mean_of_the_scores(weights):
    queries = [units(7, 4 + n, n) for n in range(len(weights))]
    index = [units(50, 4 + n, 10 + n) for n in range(len(weights))]
    index[0][3] = 0  # one model could not read it
    found = concatenate(queries, weights) @ concatenate(index, weights).T
    expected = sum(
        weight * (q.double() @ i.double().T)
        for weight, q, i in zip(weights, queries, index, strict=True)
    ) / sum(weights)
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)
    lengths = concatenate(queries, weights).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(7))


def test_the_factors_of_2019_are_weights_of_their_squares():
    parts = [units(9, 8, seed) for seed in range(3)]
    factors = [0.5, 1.0, 1.0]
    scaled = [part * factor for part, factor in zip(parts, factors, strict=True)]
    expected = F.normalize(torch.cat(scaled, dim=1), dim=1)
    torch.testing.assert_close(concatenate(parts, [0.25, 1, 1]), expected)


def test_min_max_is_by_query():  # worked by hand
    scores = torch.tensor([[3.0, 2, -1, -torch.inf], [0.5, 0.5, 0.5, 0.5]])
    found = min_max(scores)
    assert found.tolist() == [[1, 0.75, 0, -math.inf], [1, 1, 1, 1]]


def test_z_score_is_by_query():  # worked by hand
    scores = torch.tensor(
        [[4.0, 2, 0, 2, -torch.inf], [0.1] * 5, [7, *[-torch.inf] * 4]]
    )
    found = z_score(scores)
    half = math.sqrt(2)
    expected = [[half, 0, -half, 0, -math.inf], [0] * 5, [0, *[-math.inf] * 4]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("normalise", [min_max, z_score])
def test_normalised_scores_do_not_depend_on_scale_and_place(normalise):
    scores = rankings()[0][0]
    before = scores.clone()
    torch.testing.assert_close(normalise(4 * scores + 1), normalise(scores))
    assert torch.equal(scores, before)
    assert torch.isneginf(normalise(torch.full((2, 3), -torch.inf))).all()


def weighted_sum_by_hand(scores, rows, weights, k):
    lists = []
    for query in range(len(rows[0])):
        rankings = []
        for values, at in zip(scores, rows, strict=True):
            places = zip(values[query].tolist(), at[query].tolist(), strict=True)
            rankings.append({r: s for s, r in places if r >= 0 and math.isfinite(s)})
        lowest = [min(ranking.values(), default=0.0) for ranking in rankings]
        sums = {
            row: sum(
                weight * ranking.get(row, low)
                for weight, ranking, low in zip(weights, rankings, lowest, strict=True)
            )
            for row in set().union(*rankings)
        }
        best = sorted(sums.items(), key=lambda item: (-np.float32(item[1]), item[0]))
        lists.append(best[:k])
    return lists


def agree(found, expected, k):
    for values, at, best in zip(*found, expected, strict=True):
        missing = k - len(best)
        assert at.tolist() == [row for row, _ in best] + [-1] * missing
        assert values.tolist() == pytest.approx(
            [score for _, score in best] + [-math.inf] * missing, abs=1e-6
        )


@pytest.mark.parametrize("weights", [[1.0], [0.5, 2.0], [1.0, 0.25, 0.0]])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_weighted_sums_match_their_definition(weights, k):
    scores, rows = rankings(len(weights))
    expected = weighted_sum_by_hand(scores, rows, weights, k)
    agree(weighted_sum(scores, rows, weights, k), expected, k)


def test_a_ranking_alone_is_what_it_was():
    scores, rows = (each[0] for each in rankings())
    finite = torch.isfinite(scores)
    found_scores, found = weighted_sum([scores], [rows], [1.0], scores.shape[1])
    assert torch.equal(found_scores, scores)
    assert torch.equal(found[finite], rows[finite])


def rrf_by_hand(rows, weights, c, k):
    lists = []
    for query in range(len(rows[0])):
        sums = {}
        for at, weight in zip(rows, weights, strict=True):
            for place, row in enumerate(at[query].tolist(), 1):
                if row >= 0:
                    sums[row] = sums.get(row, 0.0) + weight / (c + place)
        best = sorted(sums.items(), key=lambda item: (-np.float32(item[1]), item[0]))
        lists.append(best[:k])
    return lists


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("c", [60.0, 1.0])
def test_rrf_matches_its_definition(weights, c):
    rows = rankings()[1]
    expected = rrf_by_hand(rows, weights or [1, 1, 1], c, 12)
    agree(rrf(rows, 12, weights, c), expected, 12)


def test_rrf_worked_by_hand():
    rows = [torch.tensor([[5, 7, 3]]), torch.tensor([[7, 5, 9]])]
    scores, found = rrf(rows, 5)
    assert found.tolist() == [[5, 7, 3, 9, -1]]  # of equal ones the lower row
    once, both = 1 / 63, 1 / 61 + 1 / 62
    expected = torch.tensor([[both, both, once, once, -torch.inf]])
    torch.testing.assert_close(scores, expected)


def test_fusions_leave_their_inputs_as_they_were():
    scores, rows = rankings()
    before = [each.clone() for each in (*scores, *rows)]
    weighted_sum(scores, rows, [1, 1, 1], 10)
    rrf(rows, 10)
    assert all(map(torch.equal, (*scores, *rows), before))


def test_weights_that_do_not_fit_are_refused():
    scores, rows = rankings(2)
    with pytest.raises(ValueError, match="^1 weights for 2 models or rankings$"):
        weighted_sum(scores, rows, [1.0], 10)
    with pytest.raises(ValueError, match="^0 weights for 0 models or rankings$"):
        rrf([], 10)
    with pytest.raises(ValueError, match="^a weight is -0.5; weights are finite and"):
        rrf(rows, 10, [1.0, -0.5])
    with pytest.raises(ValueError, match="^a weight is nan"):
        concatenate([units(2, 3, 0)], [math.nan])
    with pytest.raises(ValueError, match="^all weights are 0$"):
        concatenate([units(2, 3, 0)], [0.0])
    with pytest.raises(ValueError, match="^features of 2, 3 images; they must be"):
        concatenate([units(2, 3, 0), units(3, 3, 0)], [1.0, 1.0])
