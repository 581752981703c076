import math

import pytest
import torch

from kit.rerank.smoothing import smooth


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=1)


def features(count=120, dim=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, dim, generator=random)
    labels = torch.randint(8, (count,), generator=random)
    return unit(centres[labels] + torch.randn(count, dim, generator=random))


def graph(vectors, k, own=False):
    """Scores and rows of the k nearest others, or of the row itself and the k - 1 nearest."""
    cosines = vectors @ vectors.T
    ranked = cosines.clone().fill_diagonal_(2 if own else -2)
    rows = ranked.argsort(dim=1, descending=True, stable=True)[:, :k]
    return cosines.gather(1, rows), rows


def by_hand(vectors, k, beta):
    """The dense matrices of the definition, in float64."""
    vectors = vectors.double()
    cosines = vectors @ vectors.T
    kernel = torch.zeros_like(cosines)
    for row in range(len(vectors)):
        others = [o for o in cosines[row].argsort(descending=True).tolist() if o != row]
        for other in [row, *others[: k - 1]]:
            kernel[row, other] = math.exp(cosines[row, other] / beta)
    scaled = kernel.sum(1).rsqrt()[:, None] * kernel * kernel.sum(0).rsqrt()
    return unit(scaled @ vectors)


@pytest.mark.parametrize(("k", "beta"), [(5, 0.2), (2, 1.0), (1, 0.2), (12, 0.05)])
def test_smoothing_matches_its_definition(k, beta):
    vectors = features()
    found = smooth(vectors, *graph(vectors, 12), k, beta)
    torch.testing.assert_close(
        found.double(), by_hand(vectors, k, beta), atol=1e-6, rtol=0
    )


def test_smoothing_twice_is_smoothing_of_the_smoothed():
    vectors = features()
    once = smooth(vectors, *graph(vectors, 4))
    twice = smooth(once, *graph(once, 4))
    expected = by_hand(by_hand(vectors, 5, 0.2), 5, 0.2)
    torch.testing.assert_close(twice.double(), expected, atol=2e-6, rtol=0)


def test_it_moves_rows_towards_their_nearest_neighbours():
    vectors = features()
    scores, rows = graph(vectors, 4)
    new = smooth(vectors, scores, rows)
    assert (new[:, None] @ new[rows].transpose(1, 2))[:, 0].mean() > scores.mean() + 0.1


def test_a_graph_may_name_the_row_itself_or_not():
    vectors = features()
    expected = smooth(vectors, *graph(vectors, 4))
    torch.testing.assert_close(smooth(vectors, *graph(vectors, 5, own=True)), expected)
    torch.testing.assert_close(smooth(vectors, *graph(vectors, 9)), expected)


def test_alone_a_row_stays_and_an_unreadable_one_stays_zero():
    vectors = features()
    vectors[7] = 0
    scores, rows = graph(vectors, 4)
    rows[(rows == 7)] = -1
    rows[7] = rows[9] = -1
    rows[rows == 9] = -1
    scores = scores.masked_fill(rows < 0, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    found = smooth(vectors, scores.gather(1, order), rows.gather(1, order))
    assert not found[7].any()
    torch.testing.assert_close(found[9], vectors[9])


def test_permuting_the_rows_permutes_the_result():
    vectors = features()
    shuffle = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    moved = smooth(vectors[shuffle], *graph(vectors[shuffle], 4))
    torch.testing.assert_close(moved, smooth(vectors, *graph(vectors, 4))[shuffle])


def test_the_result_may_go_to_given_memory():
    vectors = features()
    out = torch.empty_like(vectors, dtype=torch.float16)
    found = smooth(vectors, *graph(vectors, 4), out=out)
    assert found is out
    expected = smooth(vectors, *graph(vectors, 4))
    torch.testing.assert_close(out.float(), expected, atol=1e-3, rtol=0)


def test_inputs_are_left_as_they_were():
    vectors = features()
    scores, rows = graph(vectors, 4)
    before = [each.clone() for each in (vectors, scores, rows)]
    smooth(vectors, scores, rows)
    assert all(map(torch.equal, (vectors, scores, rows), before))


def test_wrong_parameters_are_refused():
    vectors = features()
    with pytest.raises(ValueError, match="k is 0 and beta 0.2"):
        smooth(vectors, *graph(vectors, 4), k=0)
    with pytest.raises(ValueError, match="beta 0; .* beta above 0"):
        smooth(vectors, *graph(vectors, 4), beta=0)
    with pytest.raises(ValueError, match="of an index of 100 rows"):
        smooth(vectors[:100], *graph(vectors, 4))
