import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kit.rerank import refine as module
from kit.rerank.refine import refine


def problem(seed=0, queries=12, index=90, m=30, dim=16):
    """Queries, an index with doubles and a zero row, and rankings of different lengths."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, dim, generator=random)
    of = torch.randint(4, (index + queries,), generator=random)
    rows = centres[of] + torch.randn(index + queries, dim, generator=random)
    features = F.normalize(rows, dim=1)
    features[10], features[11], features[12] = features[13], features[14], 0
    features, own = features[:index], features[index:]
    scores, at = (own @ features.T).topk(m)
    scores[::4, -4:], at[::4, -4:] = -torch.inf, -1
    scores[1::4, -1] = -torch.inf  # unreadable, but named
    return own, features, scores, at


def refine_by_hand(queries, index, scores, rows, neighbours, beta):
    """row -> score of each query's shortlist, image after image."""
    found = []
    for query, near, at in zip(
        queries.double().numpy(), scores.tolist(), rows.tolist(), strict=True
    ):
        places = zip(near, at, strict=True)
        at = sorted(row for score, row in places if row >= 0 and score > -np.inf)
        images = {row: index[row].double().numpy() for row in at}
        refined = {}
        for row in at:
            others = [other for other in at if other != row]
            others.sort(key=lambda other: -np.float32(images[row] @ images[other]))
            total, weights = images[row].copy(), 1.0
            for other in others[:neighbours]:
                weight = beta * max(images[row] @ images[other], 0)
                total += weight * images[other]
                weights += weight
            refined[row] = total / weights
        first = {row: query @ refined[row] for row in at}
        best = sorted(at, key=lambda row: -first[row])[: neighbours + 1]
        expanded = np.max([refined[row] for row in best], axis=0)
        found.append({row: (first[row] + expanded @ refined[row]) / 2 for row in at})
    return found


@pytest.mark.parametrize("neighbours", [1, 9, 50])
@pytest.mark.parametrize("beta", [0.0, 0.15, 2.0])
def test_refinement_matches_its_definition(neighbours, beta):
    given = problem()
    expected = refine_by_hand(*given, neighbours, beta)
    scores, rows = refine(*given, neighbours, beta)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    for values, at, before, places in zip(
        scores, rows, given[3], expected, strict=True
    ):
        assert sorted(at.tolist()) == sorted(before.tolist())
        for value, row in zip(values.tolist(), at.tolist(), strict=True):
            assert value == pytest.approx(places.get(row, -np.inf), abs=1e-5)


def test_a_shortlist_worked_by_hand():
    queries = torch.tensor([[1.0, 0.0]])
    index = torch.tensor([[0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    rows, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[0.8, 0.6, -1.0]])
    # cosines .96, -.8, -.6: weights .48 between the first two, none to the third
    x, y = (0.8 + 0.48 * 0.6) / 1.48, (0.6 + 0.48 * 0.8) / 1.48
    refined = torch.tensor([[x, y], [y, x], [-1, 0]])
    query = torch.tensor([x, x])  # the largest of the first two
    expected = (refined[:, 0] + refined @ query) / 2
    found_scores, found = refine(queries, index, scores, rows, 1, 0.5)
    assert found.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(found_scores, expected[None])


def test_equal_images_are_in_the_order_of_rows():
    own, index, _, _ = problem(1)
    index = index[:1].repeat(8, 1)
    scores, rows = torch.zeros(12, 8), torch.arange(7, -1, -1).repeat(12, 1)
    found = refine(own, index, scores, rows)[1]
    assert torch.equal(found, torch.arange(8).repeat(12, 1))


def test_of_equally_near_images_the_lower_row_is_the_neighbour():
    queries = torch.tensor([[0.6, 0.8, 0.0]])
    index = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.6, 0, 0.8]])
    given = queries, index, torch.zeros(1, 3), torch.tensor([[2, 0, 1]])
    scores, rows = refine(*given, 1, 0.5)
    expected = refine_by_hand(*given, 1, 0.5)[0]
    found = dict(zip(rows[0].tolist(), scores[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_order_and_the_scores_of_the_shortlist_do_not_matter():
    own, index, scores, rows = problem(2)
    mixed = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
    expected = refine(own, index, scores, rows)
    found = refine(own, index, scores[:, mixed] / 2, rows[:, mixed])
    assert all(map(torch.equal, found, expected))


def test_blocks_of_queries_do_not_matter(monkeypatch):
    whole = refine(*problem(3))
    monkeypatch.setattr(module, "QUERIES", 1)
    found = refine(*problem(3))
    torch.testing.assert_close(found[0], whole[0], atol=1e-6, rtol=0)


def test_short_floats_are_refined_in_float32():
    own, index, scores, rows = problem(4)
    found = refine(own.half(), index.half(), scores, rows)
    expected = refine(own.half().float(), index.half().float(), scores, rows)
    assert all(map(torch.equal, found, expected))


def test_refinement_leaves_its_inputs_as_they_were():
    given = problem(5)
    before = [each.clone() for each in given]
    refine(*given)
    assert all(map(torch.equal, given, before))


def test_what_does_not_fit_is_refused():
    own, index, scores, rows = problem()
    with pytest.raises(ValueError, match="do not belong together"):
        refine(own[:5], index, scores, rows)
    with pytest.raises(ValueError, match="do not belong together"):
        refine(own[:, :8], index, scores, rows)
    with pytest.raises(ValueError, match="of an index of 20 rows"):
        refine(own, index[:20], scores, rows)
    with pytest.raises(ValueError, match="^neighbours are 0 and beta 0.15"):
        refine(own, index, scores, rows, 0)
    with pytest.raises(ValueError, match="^neighbours are 9 and beta -1"):
        refine(own, index, scores, rows, 9, -1)
