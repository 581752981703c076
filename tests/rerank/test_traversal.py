import heapq
import math

import pytest
import torch
from torch.nn import functional as F

from kit.rerank import traversal
from kit.rerank.traversal import traverse


def problem(seed=0, count=150, queries=25, width=12, ties=True):
    """A ranking (Q, width) and neighbours (N, width), themselves among them, some absent."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=random)
    of = torch.randint(4, (count + queries,), generator=random)
    rows = centres[of] + torch.randn(count + queries, 8, generator=random)
    rows = F.normalize(rows, dim=1)
    cosines = rows @ rows[:count].T
    if ties:
        cosines = (cosines * 10).round() / 10
    scores, at = cosines.sort(dim=1, descending=True, stable=True)
    scores, at = scores[:, :width].clone(), at[:, :width].clone()
    scores[::6, -2:], at[::6, -2:] = -torch.inf, -1
    return scores[count:], at[count:], scores[:count], at[:count]


def traverse_by_hand(scores, rows, graph_scores, graph_rows, k, explore, tau):
    """A heap a query, after the paper's algorithm; retrieved rows and weights."""
    lists = []
    for near, at in zip(scores.tolist(), rows.tolist(), strict=True):
        waiting, retrieved, weights = {}, [], []
        fresh = [(near[:explore], at[:explore])]
        while len(retrieved) < k:
            for edges, ends in fresh:  # explore
                for edge, row in zip(edges, ends, strict=True):
                    if row >= 0 and row not in retrieved and edge > -math.inf:
                        waiting[row] = max(edge, waiting.get(row, -math.inf))
            fresh = []
            heap = [(-edge, row) for row, edge in waiting.items()]
            heapq.heapify(heap)
            if not heap:
                break
            while True:  # exploit
                edge, row = heapq.heappop(heap)
                retrieved.append(row)
                weights.append(-edge)
                del waiting[row]
                fresh.append(
                    (
                        graph_scores[row, :explore].tolist(),
                        graph_rows[row, :explore].tolist(),
                    )
                )
                if not heap or -heap[0][0] <= tau or len(retrieved) == k:
                    break
        lists.append((retrieved, weights))
    return lists


@pytest.mark.parametrize("tau", [math.inf, 0.9, 0.5, -math.inf])
@pytest.mark.parametrize(("k", "explore"), [(1, 100), (20, 5), (60, 100), (200, 100)])
def test_the_walk_matches_its_definition(tau, k, explore):
    given = problem()
    expected = traverse_by_hand(*given, k, explore, tau)
    scores, rows = traverse(*given, k, explore, tau)
    for values, at, (retrieved, weights) in zip(scores, rows, expected, strict=True):
        missing = k - len(retrieved)
        assert at.tolist() == retrieved + [-1] * missing
        smallest = torch.tensor(weights).cummin(dim=0).values
        there = values[: len(retrieved)]
        torch.testing.assert_close(there, smallest, atol=1e-4, rtol=0)
        assert (there[1:] < there[:-1]).all() and (there <= smallest).all()
        assert torch.isneginf(values[len(retrieved) :]).all()


def test_thresholds_lead_to_different_walks():
    lists = [traverse(*problem(), k=60, tau=tau)[1] for tau in (math.inf, 0.5)]
    assert not torch.equal(*lists)


def test_a_walk_worked_by_hand():
    # 0 is near the query and leads to 2 and then 3; 1 is a little farther from the query
    scores, rows = torch.tensor([[0.8, 0.6]]), torch.tensor([[0, 1]])
    graph_scores = torch.tensor([[0.9], [0.6], [0.7], [0.7]])
    graph_rows = torch.tensor([[2], [3], [3], [2]])
    found_scores, found = traverse(scores, rows, graph_scores, graph_rows, 5)
    assert found.tolist() == [[0, 2, 3, 1, -1]]
    expected = torch.tensor([[0.8, 0.8, 0.7, 0.6, -torch.inf]])
    torch.testing.assert_close(found_scores, expected)
    # above .5 the query's own neighbours are all retrieved before any is explored
    found = traverse(scores, rows, graph_scores, graph_rows, 5, tau=0.5)[1]
    assert found.tolist() == [[0, 1, 2, 3, -1]]


def test_blocks_and_other_queries_do_not_matter(monkeypatch):
    given = problem(1)
    whole = traverse(*given, 30)
    monkeypatch.setattr(traversal, "QUERIES", 4)
    assert all(map(torch.equal, traverse(*given, 30), whole))
    alone = traverse(given[0][3:4], given[1][3:4], *given[2:], 30)
    assert all(torch.equal(a[0], b[3]) for a, b in zip(alone, whole, strict=True))


def test_permuting_the_index_permutes_the_result():
    scores, rows, graph_scores, graph_rows = problem(2, ties=False)
    new = torch.randperm(150, generator=torch.Generator().manual_seed(3))  # new -> old
    place = torch.empty_like(new)
    place[new] = torch.arange(150)

    def renamed(at):
        return torch.where(at < 0, at, place[at.clamp(min=0)])

    expected = traverse(scores, rows, graph_scores, graph_rows, 40)
    found = traverse(
        scores, renamed(rows), graph_scores[new], renamed(graph_rows[new]), 40
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], renamed(expected[1]))


def test_the_walk_leaves_its_inputs_as_they_were():
    given = problem(4)
    before = [each.clone() for each in given]
    traverse(*given, 30, tau=0.5)
    assert all(map(torch.equal, given, before))


def test_what_does_not_fit_is_refused():
    scores, rows, graph_scores, graph_rows = problem()
    with pytest.raises(ValueError, match="^k is 0; it must be at least 1$"):
        traverse(scores, rows, graph_scores, graph_rows, 0)
    with pytest.raises(ValueError, match="^explore is 0; it must be at least 1$"):
        traverse(scores, rows, graph_scores, graph_rows, 5, 0)
    with pytest.raises(ValueError, match="of an index of 10 rows"):
        traverse(scores, rows, graph_scores[:10], graph_rows[:10])
