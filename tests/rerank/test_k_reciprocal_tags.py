import pytest
import torch

from kit.rerank import k_reciprocal_tags as module
from kit.rerank.k_reciprocal_tags import Reciprocity, neighbourhoods, tag_scores
from tests.rerank.published import k_reciprocal

PUBLISHED = Reciprocity()


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=1)


def references(count=300, classes=15, dim=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=random)

    def some(n):
        labels = torch.randint(classes, (n,), generator=random)
        return unit(centres[labels] + torch.randn(n, dim, generator=random))

    return some(25), some(count)


def nearest(queries, vectors, k):
    return (-(queries.double() @ vectors.double().T)).argsort(dim=1, stable=True)[:, :k]


def by_hand(queries, rows, graph, vectors, how, k):
    """One query after another, scores over all references: rows and scores of the best k."""
    found = []
    for query, near in zip(queries, rows, strict=True):
        near = near[near >= 0]
        union = torch.cat([near, graph[near].flatten()]).unique()
        union = union[union >= 0]
        local = torch.cat([query[None], vectors[union]]).double().numpy()
        mixed, _ = k_reciprocal(local, 1, how.k1, how.k2, how.share)
        plain = 1 - (vectors.double() @ query.double() + 1) / 2
        distances = how.share * plain + (1 - how.share)
        distances[union] = torch.from_numpy(mixed[0])
        order = distances.argsort(stable=True)[:k]
        found.append((order.tolist(), (1 - distances[order]).tolist()))
    return found


def compare(queries, rows, graph, vectors, how=PUBLISHED, k=3):
    scores, found = tag_scores(queries, rows, graph, vectors, k, how)
    expected = by_hand(queries, rows, graph, vectors, how, k)
    for query, (order, values) in enumerate(expected):
        assert found[query].tolist() == order
        assert scores[query].tolist() == pytest.approx(values, abs=1e-6)
    return found


@pytest.mark.parametrize(
    ("how", "t", "k"),
    [
        (Reciprocity(), 30, 3),
        (Reciprocity(5, 1, 0.2), 12, 5),
        (Reciprocity(4, 7, 0.8), 8, 1),
    ],
)
def test_tag_scores_match_the_published_loop(how, t, k):
    queries, vectors = references()
    graph = nearest(vectors, vectors, t)
    compare(queries, nearest(queries, vectors, t), graph, vectors, how, k)


def test_rows_count_that_only_expanded_sets_reach():
    queries, vectors = references(count=200, classes=5, dim=8)
    graph = nearest(vectors, vectors, 20)
    how = Reciprocity(6, 1, 0.2)
    compare(queries, nearest(queries, vectors, 20), graph, vectors, how, k=20)


def test_the_best_may_lie_outside_the_query_s_own_neighbours():
    queries, vectors = references()
    rows = nearest(queries, vectors, 8)
    found = compare(queries, rows, nearest(vectors, vectors, 8), vectors)
    assert (~(found[:, :, None] == rows[:, None]).any(2)).any()


def test_nothing_outside_the_neighbourhood_is_ever_among_the_best():
    # by_hand ranks all references; the neighbourhoods here are much smaller
    queries, vectors = references(count=600, classes=300)
    rows, graph = nearest(queries, vectors, 4), nearest(vectors, vectors, 4)
    assert neighbourhoods(rows, graph)[1].max() < 20
    compare(queries, rows, graph, vectors, Reciprocity(3, 2), k=4)


def test_neighbourhoods_hold_each_row_once():  # worked by hand
    graph = torch.tensor([[1, 2], [0, 4], [0, -1], [3, 3], [-1, -1]])
    unions, sizes = neighbourhoods(torch.tensor([[1, 2], [4, -1]]), graph)
    assert unions.tolist() == [[0, 1, 2, 4], [4, -1, -1, -1]]
    assert sizes.tolist() == [4, 1]


def test_ties_go_to_the_lower_row():
    random = torch.Generator().manual_seed(2)
    vectors = torch.randint(0, 2, (120, 4), generator=random) * 2.0 - 1
    vectors = vectors / 2  # 16 different rows of unit length, cosines exact in float32
    queries = vectors[torch.tensor([3, 50, 119])].clone()
    for k1, k2 in ((10, 3), (6, 1)):
        how = Reciprocity(k1, k2, 0.2)
        rows, graph = nearest(queries, vectors, 20), nearest(vectors, vectors, 20)
        compare(queries, rows, graph, vectors, how, k=20)


def test_fewer_references_than_places():
    queries, vectors = references(count=2, classes=1)
    rows, graph = nearest(queries, vectors, 2), nearest(vectors, vectors, 2)
    scores, found = tag_scores(queries, rows, graph, vectors, k=3)
    assert (found[:, 2] == -1).all() and (scores[:, 2] == -torch.inf).all()
    compare(queries, rows, graph, vectors, k=2)


def test_absent_neighbours_are_nobody():
    queries, vectors = references()
    rows, graph = nearest(queries, vectors, 9), nearest(vectors, vectors, 9)
    short = rows.clone()
    short[3, 4:] = -1
    sparse = graph.clone()
    sparse[rows[5], 2:] = -1
    compare(queries, short, sparse, vectors)
    padded = torch.nn.functional.pad(short, (0, 3), value=-1)
    for got, expected in zip(
        tag_scores(queries, padded, sparse.int(), vectors),
        tag_scores(queries, short, sparse, vectors),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_a_query_s_scores_do_not_depend_on_the_others_or_the_batches(monkeypatch):
    queries, vectors = references()
    rows, graph = nearest(queries, vectors, 9), nearest(vectors, vectors, 9)
    scores, found = tag_scores(queries, rows, graph, vectors)
    for cells in (1, 20_000):
        monkeypatch.setattr(module, "CELLS", cells)
        again, same = tag_scores(queries, rows, graph, vectors)
        assert torch.equal(same, found)
        torch.testing.assert_close(again, scores)
    alone, same = tag_scores(queries[7:8], rows[7:8], graph, vectors)
    assert torch.equal(same[0], found[7])
    torch.testing.assert_close(alone[0], scores[7])


def test_permuting_the_references_permutes_the_rows():
    queries, vectors = references()
    rows, graph = nearest(queries, vectors, 9), nearest(vectors, vectors, 9)
    scores, found = tag_scores(queries, rows, graph, vectors)
    shuffle = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(5))
    moved = vectors[shuffle]
    rows, graph = nearest(queries, moved, 9), nearest(moved, moved, 9)
    again, same = tag_scores(queries, rows, graph, moved)
    assert torch.equal(shuffle[same], found)
    torch.testing.assert_close(again, scores)


def test_half_precision_references_are_read_as_they_are():
    queries, vectors = references()
    vectors = vectors.half()
    rows, graph = nearest(queries, vectors, 9), nearest(vectors, vectors, 9)
    found = tag_scores(queries, rows, graph, vectors)
    expected = tag_scores(queries, rows, graph, vectors.float())
    assert all(map(torch.equal, found, expected))


def test_inputs_are_left_as_they_were():
    queries, vectors = references()
    given = queries, nearest(queries, vectors, 9), nearest(vectors, vectors, 9), vectors
    before = [each.clone() for each in given]
    tag_scores(*given)
    assert all(map(torch.equal, given, before))


def test_wrong_neighbours_are_refused():
    queries, vectors = references()
    rows, graph = nearest(queries, vectors, 9), nearest(vectors, vectors, 9)
    with pytest.raises(ValueError, match="reference 300 of the neighbours is not in"):
        tag_scores(queries, rows.clone().fill_(300), graph, vectors)
    with pytest.raises(ValueError, match="24 queries, neighbours of 25"):
        tag_scores(queries[1:], rows, graph, vectors)
    nobody = rows.clone()
    nobody[4] = -1
    with pytest.raises(ValueError, match="query 4 has no neighbour that could vote"):
        tag_scores(queries, nobody, graph, vectors)
    with pytest.raises(ValueError, match="k1 0, k2 3, share 0.5: k1 and k2 must be"):
        Reciprocity(k1=0)
