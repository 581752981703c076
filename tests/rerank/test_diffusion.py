import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kit.rerank import diffusion
from kit.rerank.diffusion import Solver, affinity, diffuse, offline, online, solve

EXACT = Solver(iterations=500, tolerance=1e-10)


def features(count, seed, dim=12):
    random = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(5, dim, generator=random)
    of = torch.randint(5, (count,), generator=random)
    return F.normalize(centres[of] + torch.randn(count, dim, generator=random), dim=1)


def knn(own, index, k):
    return (own @ index.T).topk(k)


@pytest.fixture(scope="module")
def graph():
    """Neighbours (120, 9), some places absent, some similarities negative."""
    index = features(120, 0)
    scores, rows = knn(index, index, 9)
    scores[::7, -3:], rows[::7, -3:] = -torch.inf, -1
    scores[3, 1:], scores[5, 2:] = -0.1, -0.2
    mutual = int(rows[8, 1])  # below 0 from both sides
    scores[8, 1] = scores[mutual][rows[mutual] == 8] = -0.3
    assert (rows[mutual] == 8).any()
    return scores, rows


@pytest.fixture(scope="module")
def ranking():
    scores, rows = knn(features(20, 1), features(120, 0), 60)
    scores[::3, -8:], rows[::3, -8:] = -torch.inf, -1
    scores[2, 2] = -0.4
    return scores, rows


def affinity_by_hand(scores, rows, kd, gamma):
    """The dense S, edge after edge."""
    scores, rows = scores.double().numpy()[:, :kd], rows.numpy()[:, :kd]
    count = len(rows)
    edges = np.zeros((count, count))
    for i in range(count):
        for s_ij, j in zip(scores[i], rows[i], strict=True):
            if j >= 0 and j != i and i in rows[j]:
                s_ji = scores[j][rows[j].tolist().index(i)]
                edges[i, j] = max((s_ij + s_ji) / 2, 0) ** gamma
    degree = edges.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    return scale[:, None] * edges * scale


def dense(graph):
    out = torch.zeros(len(graph.rows), len(graph.rows))
    held = graph.rows.clamp(min=0)
    return out.scatter_add_(1, held, graph.weights)


@pytest.mark.parametrize("kd", [1, 4, 9, 50])
@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_the_affinity_matches_its_definition(graph, kd, gamma):
    found = dense(affinity(*graph, kd, gamma))
    expected = torch.tensor(affinity_by_hand(*graph, kd, gamma)).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()


def test_the_affinity_does_not_depend_on_the_block(graph, monkeypatch):
    whole = affinity(*graph)
    monkeypatch.setattr(diffusion, "ROWS", 11)
    assert torch.equal(affinity(*graph).weights, whole.weights)


def cut_by_hand(whole, rows):
    """S between the rows of one set; absent places have no edges."""
    out = np.zeros((len(rows), len(rows)))
    for a, i in enumerate(rows):
        for b, j in enumerate(rows):
            if i >= 0 and j >= 0:
                out[a, b] = whole[i, j]
    return out


def gradients_by_hand(matrix, y, tolerance, iterations):
    """Conjugate gradients from 0, after the textbook."""
    f, residual = np.zeros_like(y), y.copy()
    direction = residual.copy()
    for _ in range(iterations):
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(y):
            break
        step = residual @ residual / (direction @ matrix @ direction)
        f = f + step * direction
        new = residual - step * (matrix @ direction)
        direction = new + (new @ new) / (residual @ residual) * direction
        residual = new
    return f


def heats_by_hand(scores, rows, whole, kq, gamma, solver):
    out = []
    for near, at in zip(scores.double().numpy(), rows.tolist(), strict=True):
        y = np.where(np.arange(len(at)) < kq, np.maximum(near, 0) ** gamma, 0)
        matrix = np.eye(len(at)) - solver.alpha * cut_by_hand(whole, at)
        out.append(gradients_by_hand(matrix, y, solver.tolerance, solver.iterations))
    return np.array(out)


@pytest.mark.parametrize("kq", [1, 10, 100])
@pytest.mark.parametrize("solver", [Solver(), Solver(0.5, 1e-2, 20), Solver(0.9, 0, 3)])
def test_diffusion_matches_its_definition(graph, ranking, kq, solver):
    scores, rows = ranking
    whole = affinity_by_hand(*graph, 50, 3.0)
    heats = heats_by_hand(scores, rows, whole, kq, 3.0, solver)
    found_scores, found = diffuse(scores, rows, affinity(*graph), kq, 3.0, solver)
    for query in range(len(rows)):
        there = [row for row in rows[query].tolist() if row >= 0]
        heat = dict(zip(there, heats[query], strict=False))
        at = found[query].tolist()[: len(there)]
        assert sorted(at) == sorted(there)
        expected = torch.tensor([heat[row] for row in at]).float()
        torch.testing.assert_close(
            found_scores[query, : len(there)], expected, atol=2e-6, rtol=1e-4
        )
        assert (found[query, len(there) :] == -1).all()
        assert torch.isneginf(found_scores[query, len(there) :]).all()
        assert (
            found_scores[query, 1 : len(there)] < found_scores[query, : len(there) - 1]
        ).all()


def test_enough_iterations_solve_the_system(graph, ranking):
    rows = ranking[1]
    heat = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2))
    whole = affinity_by_hand(*graph, 50, 3.0)
    expected = np.stack(
        [
            np.linalg.solve(np.eye(len(at)) - 0.99 * cut_by_hand(whole, at), y)
            for at, y in zip(rows.tolist(), heat.double().numpy(), strict=True)
        ]
    )
    found = solve(heat, rows, affinity(*graph), EXACT)
    torch.testing.assert_close(
        found, torch.tensor(expected).float(), atol=1e-5, rtol=1e-5
    )


def test_what_no_heat_reaches_stays_behind_in_its_order():
    # edges 0-1 and 2-3 only; the query's neighbour is 3
    scores = torch.tensor([[0.9], [0.9], [0.8], [0.8]])
    graph = affinity(scores, torch.tensor([[1], [0], [3], [2]]))
    rows = torch.tensor([[3, 1, 0, 2]])
    found_scores, found = diffuse(
        torch.tensor([[0.9, 0.5, 0.4, 0.3]]), rows, graph, kq=1
    )
    assert found.tolist() == [[3, 2, 1, 0]]
    assert found_scores[0, 1] > 0.1 and abs(found_scores[0, 2:]).max() < 1e-40


@pytest.mark.parametrize("places", [17, 100, 1000])
def test_many_that_no_heat_reaches_stay_in_their_order(places):
    """And those of equal heat: the first three have the same, all others none."""
    alone = torch.arange(1500)[:, None]
    graph = affinity(torch.ones(1500, 1), alone)  # without edges
    random = torch.Generator().manual_seed(0)
    rows = torch.stack(
        [torch.randperm(1500, generator=random)[:places] for _ in range(5)]
    )
    found_scores, found = diffuse(torch.full((5, places), 0.5), rows, graph, kq=3)
    assert torch.equal(found, rows)
    assert (found_scores[:, 1:] < found_scores[:, :-1]).all()
    backwards = diffuse(torch.full((5, places), 0.5), rows.flip(1), graph, kq=3)[1]
    assert torch.equal(backwards, rows.flip(1))


def test_one_query_and_blocks_of_them_are_the_same(graph, ranking, monkeypatch):
    edges = affinity(*graph)
    whole = diffuse(*ranking, edges)
    monkeypatch.setattr(diffusion, "SETS", 3)
    assert all(map(torch.equal, diffuse(*ranking, edges), whole))
    alone = diffuse(ranking[0][4:5], ranking[1][4:5], edges)
    assert all(torch.equal(a[0], b[4]) for a, b in zip(alone, whole, strict=True))


def test_permuting_the_index_permutes_the_result(graph, ranking):
    new = torch.randperm(120, generator=torch.Generator().manual_seed(3))  # new -> old
    place = torch.empty_like(new)
    place[new] = torch.arange(120)

    def renamed(rows):
        return torch.where(rows < 0, rows, place[rows.clamp(min=0)])

    moved = affinity(graph[0][new], renamed(graph[1][new]))
    expected = diffuse(*ranking, affinity(*graph))
    found = diffuse(ranking[0], renamed(ranking[1]), moved)
    assert torch.equal(found[1], renamed(expected[1]))
    torch.testing.assert_close(found[0], expected[0], atol=1e-7, rtol=1e-5)


def online_by_hand(scores, rows, truncated, heats, k, kq, gamma):
    lists = []
    for near, at in zip(scores.tolist(), rows.tolist(), strict=True):
        sums = {}
        for score, row in list(zip(near, at, strict=True))[:kq]:
            if row < 0:
                continue
            heat = max(score, 0.0) ** gamma
            gains = zip(truncated[row].tolist(), heats[row].tolist(), strict=True)
            for reached, gain in gains:
                if reached >= 0 and heat * gain != 0:
                    sums[reached] = sums.get(reached, 0.0) + heat * gain
        best = sorted(sums.items(), key=lambda item: (-np.float32(item[1]), item[0]))
        lists.append(best[:k])
    return lists


@pytest.mark.parametrize(("k", "kq"), [(1, 1), (30, 10), (150, 3)])
def test_heat_computed_before_the_queries_are_known_adds_up(graph, ranking, k, kq):
    edges = affinity(*graph)
    index = features(120, 0)
    truncated = knn(index, index, 40)[1]
    truncated[4, 30:] = -1
    heats = offline(truncated, edges)
    scores, rows = online(*ranking, truncated, heats, k, kq)
    expected = online_by_hand(*ranking, truncated, heats, k, kq, 3.0)
    for values, at, best in zip(scores, rows, expected, strict=True):
        assert at.tolist() == [row for row, _ in best] + [-1] * (k - len(best))
        sums = torch.tensor([value for _, value in best])
        torch.testing.assert_close(values[: len(best)], sums, atol=1e-6, rtol=1e-6)


def test_both_ways_are_one_where_nothing_is_truncated(graph):
    edges = affinity(*graph)
    queries, index = features(15, 5), features(120, 0)
    scores, rows = knn(queries, index, 120)
    own = torch.arange(120)[:, None]
    others = (own + torch.arange(120)) % 120  # the image itself first
    heats = offline(others, edges, EXACT)
    assert (others[:, 0] == own[:, 0]).all()
    by_query = diffuse(scores, rows, edges, solver=EXACT)
    by_image = online(scores, rows, others, heats, 120)
    for query in range(15):
        there = torch.isfinite(by_image[0][query])
        expected = torch.zeros(120)
        expected[by_query[1][query]] = by_query[0][query]
        found = torch.zeros(120)
        found[by_image[1][query][there]] = by_image[0][query][there]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_diffusion_leaves_its_inputs_as_they_were(graph, ranking):
    before = [each.clone() for each in (*graph, *ranking)]
    edges = affinity(*graph)
    copies = edges.rows.clone(), edges.weights.clone()
    diffuse(*ranking, edges)
    offline(ranking[1], edges)
    assert all(map(torch.equal, (*graph, *ranking), before))
    assert all(map(torch.equal, (edges.rows, edges.weights), copies))


def test_what_does_not_fit_is_refused(graph, ranking):
    with pytest.raises(ValueError, match=r"^alpha is 1.0; it must be in \[0, 1\)$"):
        Solver(1.0)
    with pytest.raises(ValueError, match="of an index of 50 rows"):
        affinity(graph[0][:50], graph[1][:50])
    few = diffusion.Affinity(graph[1][:50], graph[0][:50])
    with pytest.raises(ValueError, match="of an index of 50 rows"):
        diffuse(*ranking, few)
