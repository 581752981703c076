import numpy as np
import pytest
import torch

from kit.rerank import k_reciprocal as module
from kit.rerank.k_reciprocal import encode, half, jaccard, jaccard_rerank, own_first
from tests.rerank.published import k_reciprocal


def clustered(count, classes, dim=48, noise=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=random)
    features = centres[torch.randint(classes, (count,), generator=random)]
    features = features + noise * torch.randn(count, dim, generator=random)
    return torch.nn.functional.normalize(features, dim=1)


def graph(features, k, own=True):
    """Each row's k nearest, ties to the lower row; its own row first or left out."""
    distances = -(features.double() @ features.double().T)
    distances.fill_diagonal_(-2)
    return distances.argsort(dim=1, stable=True)[:, 0 if own else 1 :][:, :k]


def everything(queries, count):
    return torch.arange(count - queries).expand(queries, -1)


def reranked(features, queries, rows, k1, k2, share=0.3):
    """(Q, U - Q) new scores of the whole index, by row, and the encoding."""
    encoding = encode(rows, features, queries, k1, k2)
    cosines = features[:queries] @ features[queries:].T
    near = everything(queries, len(features))
    scores, order = jaccard_rerank(cosines, near, encoding, share)
    return torch.zeros_like(scores).scatter(1, order, scores), encoding


@pytest.mark.parametrize(
    ("count", "queries", "k1", "k2", "share"),
    [
        (2000, 5, 20, 6, 0.3),
        (300, 40, 10, 3, 0.5),
        (300, 1, 7, 1, 0.0),
        (120, 7, 5, 9, 1.0),  # k2 beyond k1
        (12, 3, 20, 6, 0.3),  # k1 beyond the union
        (2, 1, 20, 6, 0.3),
    ],
)
def test_reranking_matches_the_published_dense_loop(count, queries, k1, k2, share):
    features = clustered(count, max(count // 20, 1))
    expected, distances = k_reciprocal(
        features.double().numpy(), queries, k1, k2, share
    )
    rows = graph(features, max(k1 + 1, k2))
    scores, encoding = reranked(features, queries, rows, k1, k2, share)
    np.testing.assert_allclose(1 - scores, expected, rtol=0, atol=1e-6)
    found = jaccard(encoding, torch.arange(queries))
    np.testing.assert_allclose(found, distances, rtol=0, atol=1e-6)


def test_equal_features_are_ranked_by_row():
    random = torch.Generator().manual_seed(3)
    features = torch.randint(-1, 2, (80, 4), generator=random).float()
    features[(features == 0).all(1)] = 1
    features = torch.nn.functional.normalize(features, dim=1).repeat(2, 1)
    rows = graph(features, 12)
    ranks = rows.numpy()
    expected, _ = k_reciprocal(features.double().numpy(), 9, 10, 3, 0.3, ranks)
    scores, _ = reranked(features, 9, rows, 10, 3)
    np.testing.assert_allclose(1 - scores, expected, rtol=0, atol=1e-6)


def test_a_graph_may_name_the_row_itself_or_not():
    features = clustered(200, 10)
    with_own = encode(graph(features, 11), features, 20, 10, 3)
    last = torch.cat(
        [graph(features, 10, own=False), torch.arange(200)[:, None]], dim=1
    )
    for rows in (graph(features, 10, own=False), last, last.int()):
        without = encode(rows, features, 20, 10, 3)
        assert torch.equal(with_own.columns, without.columns)
        assert torch.equal(with_own.values, without.values)


def test_lists_begin_with_the_row_itself():  # worked by hand
    rows = torch.tensor([[1, 2, 0], [2, 0, -1], [-1, -1, -1]])
    assert own_first(rows, 3).tolist() == [[0, 1, 2], [1, 2, 0], [2, -1, -1]]
    assert own_first(rows, 2).tolist() == [[0, 1], [1, 2], [2, -1]]
    assert own_first(rows, 5)[0].tolist() == [0, 1, 2, -1, -1]


def test_half_of_k_is_rounded_as_published():
    assert [half(k) for k in (1, 3, 5, 10, 20)] == [1, 3, 3, 6, 11]


def test_rows_without_neighbours_are_far_from_all_others():
    features = clustered(60, 4)
    rows = graph(features, 11)
    rows[50] = -1
    rows[rows == 50] = -1
    distances = jaccard(encode(rows, features, 5, 10, 1), torch.tensor([50, 3]))
    assert distances[0, 50] == pytest.approx(0, abs=1e-6)
    assert (distances[0, torch.arange(60) != 50] == 1).all()
    assert distances[1, 50] == 1


def test_a_row_s_distance_to_itself_is_0_and_none_is_beyond_1():
    features = clustered(300, 12)
    distances = jaccard(encode(graph(features, 21), features, 30), torch.arange(300))
    torch.testing.assert_close(
        distances.diagonal(), torch.zeros(300), atol=1e-6, rtol=0
    )
    assert distances.min() > -1e-6 and distances.max() <= 1
    torch.testing.assert_close(distances, distances.T)


def test_a_shortlist_is_reranked_as_the_whole_index_is():
    features = clustered(300, 12)
    whole, encoding = reranked(features, 30, graph(features, 21), 20, 6)
    cosines = features[:30] @ features[30:].T
    near, rows = cosines.topk(40, dim=1)
    rows[4, 30:] = -1
    scores, order = jaccard_rerank(near, rows, encoding)
    for query in range(30):
        here = rows[query][rows[query] >= 0]
        expected = sorted(here.tolist(), key=lambda row: (-whole[query, row], row))
        assert order[query, : len(here)].tolist() == expected
        assert torch.equal(scores[query, : len(here)], whole[query, expected])
    assert (order[4, 30:] == -1).all() and (scores[4, 30:] == -torch.inf).all()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_image_of_no_score_stays_last(share):
    features = clustered(100, 5)
    encoding = encode(graph(features, 21), features, 10)
    near, rows = (features[:10] @ features[10:].T).topk(20, dim=1)
    near[:, -2:] = -torch.inf
    scores, order = jaccard_rerank(near, rows, encoding, share)
    assert torch.equal(order[:, -2:], rows[:, -2:].sort(dim=1).values)
    assert (scores[:, -2:] == -torch.inf).all() and torch.isfinite(scores[:, :-2]).all()


def test_some_of_the_queries_are_reranked_as_all_are():
    features = clustered(300, 12)
    encoding = encode(graph(features, 21), features, 30)
    near, rows = (features[:30] @ features[30:].T).topk(40, dim=1)
    scores, order = jaccard_rerank(near, rows, encoding)
    some = torch.tensor([17, 3])
    for got, all_of in zip(
        jaccard_rerank(near[some], rows[some], encoding, of=some),
        (scores, order),
        strict=True,
    ):
        assert torch.equal(got, all_of[some])


def test_the_block_sizes_do_not_matter(monkeypatch):
    features = clustered(300, 12)
    near, rows = (features[:30] @ features[30:].T).topk(40, dim=1)
    encoding = encode(graph(features, 21), features, 30)
    expected = jaccard_rerank(near, rows, encoding)
    for name, size in (("ROWS", 7), ("PAIRS", 11), ("CELLS", 700)):
        monkeypatch.setattr(module, name, size)
    again = encode(graph(features, 21), features, 30)
    assert torch.equal(again.columns, encoding.columns)
    torch.testing.assert_close(again.values, encoding.values)
    found = jaccard_rerank(near, rows, again)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_permuting_the_index_permutes_the_result():
    features = clustered(300, 12)
    whole, _ = reranked(features, 30, graph(features, 21), 20, 6)
    random = torch.Generator().manual_seed(1)
    shuffle = torch.randperm(270, generator=random)
    moved = torch.cat([features[:30], features[30:][shuffle]])
    found, _ = reranked(moved, 30, graph(moved, 21), 20, 6)
    torch.testing.assert_close(found, whole[:, shuffle])


def test_half_precision_features_are_read_as_they_are():
    features = clustered(200, 10).half()
    rows = graph(features.float(), 21)
    found = encode(rows, features, 20)
    assert torch.equal(found.values, encode(rows, features.float(), 20).values)


def test_inputs_are_left_as_they_were():
    features = clustered(100, 5)
    rows = graph(features, 21)
    near, short = (features[:10] @ features[10:].T).topk(20, dim=1)
    given = features, rows, near, short
    before = [each.clone() for each in given]
    encoding = encode(rows, features, 10)
    parts = encoding.starts, encoding.columns, encoding.values
    kept = [each.clone() for each in parts]
    jaccard_rerank(near, short, encoding)
    assert all(map(torch.equal, given, before))
    assert all(map(torch.equal, parts, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, "k1 is 0 and k2 is 6; both must be at least 1"),
        ({"k1": 40}, "21 neighbours a row; k1 = 40 and k2 = 6 need 40"),
        ({"features": clustered(99, 5)}, "a graph of 100 rows and 99 features"),
        ({"queries": 100}, "100 queries and an index"),
        ({"rows": torch.full((100, 21), 100)}, "names row 100; the union has 100"),
    ],
)
def test_a_wrong_graph_is_refused(change, message):
    features = clustered(100, 5)
    given = {"rows": graph(features, 21), "features": features, "queries": 10}
    with pytest.raises(ValueError, match=message):
        encode(**{**given, **change})


def test_a_wrong_shortlist_is_refused():
    features = clustered(100, 5)
    encoding = encode(graph(features, 21), features, 10)
    scores, rows = torch.zeros(10, 3), torch.arange(3).expand(10, -1)
    with pytest.raises(ValueError, match="names row 90 of an index of 90"):
        jaccard_rerank(scores, rows + 88, encoding)
    with pytest.raises(ValueError, match="a shortlist of 9 queries, encodings of 10"):
        jaccard_rerank(scores[:9], rows[:9], encoding)
    with pytest.raises(ValueError, match="share is 1.5; it must be between 0 and 1"):
        jaccard_rerank(scores, rows, encoding, share=1.5)
