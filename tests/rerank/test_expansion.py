import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kit.rerank import expansion
from kit.rerank.expansion import (
    alpha_qe,
    dba,
    decaying,
    equal,
    expand,
    powered,
    verified,
)


def features(count, seed, dim=16):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, dim, generator=random)
    of = torch.randint(6, (count,), generator=random)
    rows = centres[of] + torch.randn(count, dim, generator=random)
    rows[count // 3] = 0  # unreadable
    return F.normalize(rows, dim=1)


def neighbours(own, index, k):
    """All cosines, sorted; a few places absent."""
    scores, rows = (own @ index.T).topk(k)
    scores[::5, -2:], rows[::5, -2:] = -torch.inf, -1
    return scores, rows


@pytest.fixture
def search():
    queries, index = features(30, 0), features(200, 1)
    return queries, index, *neighbours(queries, index, 12)


def unit(row):
    length = np.linalg.norm(row)
    return row / length if length else row


def alpha_qe_by_hand(queries, index, scores, rows, n, alpha):
    out = []
    for query, near, at in zip(queries, scores, rows, strict=True):
        total = query.astype(float)
        for score, row in list(zip(near, at, strict=True))[:n]:
            if row >= 0 and score > 0:
                total = total + float(score) ** alpha * index[row].astype(float)
        out.append(unit(total) if query.any() else query)
    return torch.tensor(np.array(out), dtype=torch.float32)


@pytest.mark.parametrize("n", [1, 10, 50])
@pytest.mark.parametrize("alpha", [0.0, 1.5, 3.0])
def test_alpha_qe_matches_its_definition(search, n, alpha):
    expected = alpha_qe_by_hand(*(each.numpy() for each in search), n, alpha)
    found = alpha_qe(*search, n, alpha)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_query_worked_by_hand():
    queries, index = torch.tensor([[1.0, 0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    scores, rows = torch.tensor([[0.8, 0.6]]), torch.tensor([[1, 0]])
    # 1 + .8^3 .8 + .6^3 .6, .8^3 .6 + .6^3 .8
    expected = F.normalize(torch.tensor([[1.5392, 0.48]]))
    torch.testing.assert_close(alpha_qe(queries, index, scores, rows), expected)


def test_neighbours_that_point_away_have_no_part():
    queries, index = torch.tensor([[1.0, 0]]), torch.tensor([[-0.6, 0.8]])
    found = alpha_qe(queries, index, torch.tensor([[-0.6]]), torch.tensor([[0]]), 1, 3)
    assert found.tolist() == [[1, 0]]


def dba_by_hand(rows_in, scores, rows, k, kind, labels):
    """One row after another; the row itself first, then the best others."""
    out = []
    for own, row in enumerate(rows_in):
        others = [
            (score, at)
            for score, at in zip(scores[own], rows[own], strict=True)
            if at != own
        ][: k - 1]
        total = row.astype(float)
        for place, (score, at) in enumerate(others, 1):
            if at < 0:
                continue
            weight = {
                "equal": 1.0,
                "decaying": 10 ** (-1.5 * place / (k - 1)),
                "powered": max(float(score), 0.0) ** 3,
            }[kind]
            if labels is not None and (labels[at] != labels[own] or labels[own] < 0):
                weight = 0.0
            total = total + weight * rows_in[at].astype(float)
        out.append(unit(total) if row.any() else row)
    return torch.tensor(np.array(out), dtype=torch.float32)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("kind", ["equal", "decaying", "powered"])
@pytest.mark.parametrize("supervised", [False, True])
def test_dba_matches_its_definition(k, kind, supervised):
    rows_in = features(150, 2)
    rows_in[9] = rows_in[8]  # exact duplicates: a row is not always its own first
    scores, rows = neighbours(rows_in, rows_in, 14)
    assert (rows[:, 0] != torch.arange(150)).any()
    labels = torch.arange(150) % 7 - 1 if supervised else None
    weigh = {"equal": equal, "decaying": decaying, "powered": powered(3)}[kind]
    found = dba(rows_in, scores, rows, k, weigh, labels)
    arrays = [None if each is None else each.numpy() for each in (rows_in, scores)]
    expected = dba_by_hand(
        *arrays, rows.numpy(), k, kind, labels if labels is None else labels.numpy()
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_graph_with_and_without_the_rows_themselves_gives_the_same():
    rows_in = features(100, 3)
    cosines = rows_in @ rows_in.T
    readable = rows_in.any(dim=1)
    cosines.fill_diagonal_(2)
    scores, rows = cosines.topk(12)
    with_self = dba(rows_in, scores.clamp(max=1), rows, 10, decaying)
    without = dba(rows_in, scores[:, 1:], rows[:, 1:], 10, decaying)
    assert torch.equal(rows[readable, 0], torch.arange(100)[readable])
    assert torch.equal(with_self, without)


def test_decaying_weights_are_those_of_the_competition():
    weights = decaying(torch.zeros(2, 9))
    expected = torch.tensor(np.logspace(0, -1.5, 10)[1:], dtype=torch.float32)
    torch.testing.assert_close(weights, expected.expand(2, -1))


def test_verified_neighbours_are_those_with_the_most_inliers():  # worked by hand
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, -0.5, -torch.inf]])
    rows = torch.tensor([[4, 3, 2, 1, 0, -1]])
    inliers = torch.tensor([[89, 90, 200, 90, 150, 300]])
    at, weights = verified(scores, rows, inliers)
    assert at[weights > 0].tolist() == [2, 3, 1]
    torch.testing.assert_close(
        weights.sort(descending=True).values[0, :3], weights.new_tensor([0.8, 0.7, 0.6])
    )
    assert weights.shape == (1, 5)
    at, weights = verified(scores, rows, inliers, most=3)
    assert at.tolist() == [[2, 0, 3]]  # the first of the two with 90
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.0, 0.8]]))
    assert not verified(scores, rows, inliers, at_least=301)[1].any()


def test_of_many_with_equal_inliers_the_first_places_are_taken():
    random = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(900, generator=random) for _ in range(4)])
    scores = torch.full((4, 900), 0.5)
    inliers = 90 + torch.randint(2, (4, 900), generator=random)
    at, _ = verified(scores, rows, inliers, most=600)
    for query in range(4):
        more, fewer = (rows[query][inliers[query] == count] for count in (91, 90))
        assert torch.equal(at[query], torch.cat([more, fewer])[:600])


def verified_by_hand(own, index, scores, rows, inliers, at_least, most):
    out = []
    for row, near, at, counts in zip(own, scores, rows, inliers, strict=True):
        places = [p for p in range(len(at)) if counts[p] >= at_least and at[p] >= 0]
        places = sorted(places, key=lambda p: -counts[p])[:most]
        total = row.astype(float)
        for place in places:
            total = total + max(float(near[place]), 0) * index[at[place]].astype(float)
        out.append(unit(total) if row.any() else row)
    return torch.tensor(np.array(out), dtype=torch.float32)


@pytest.mark.parametrize(("at_least", "most"), [(90, 5), (50, 3), (1, 20), (500, 5)])
def test_expansion_by_verified_neighbours_matches_its_definition(
    search, at_least, most
):
    queries, index, scores, rows = search
    random = torch.Generator().manual_seed(4)
    inliers = 10 * torch.randint(20, rows.shape, generator=random)
    found = expand(queries, index, *verified(scores, rows, inliers, at_least, most))
    arrays = (each.numpy() for each in (*search, inliers))
    expected = verified_by_hand(*arrays, at_least, most)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_sums_of_short_floats_are_taken_in_float32(search, kind):
    queries, index, scores, rows = search
    short = index.to(kind)
    found = alpha_qe(queries, short, scores, rows)
    expected = alpha_qe(queries, short.float(), scores, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found = dba(short, *neighbours(index, index, 10), 10)
    assert found.dtype == torch.float32
    lengths = found.norm(dim=1)[index.any(dim=1)]
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_unreadable_rows_stay_zero_and_add_nothing():
    rows_in = features(60, 5)
    scores, rows = neighbours(rows_in, rows_in, 8)
    rows[:, 3], scores[:, 3] = 20, 1.0  # the row of zeros is everybody's neighbour
    found = dba(rows_in, scores, rows, 8)
    assert not found[20].any() and found[torch.arange(60) != 20].any(dim=1).all()
    rows[:, 3] = -1
    readable = torch.arange(60) != 20
    torch.testing.assert_close(
        dba(rows_in, scores, rows, 8)[readable], found[readable], atol=1e-6, rtol=0
    )


def test_blocks_do_not_matter(monkeypatch):
    rows_in = features(150, 6)
    scores, rows = neighbours(rows_in, rows_in, 10)
    whole = dba(rows_in, scores, rows, 10, decaying)
    monkeypatch.setitem(expansion.ROWS, "cpu", 20)
    monkeypatch.setitem(expansion.GATHERED, "cpu", 1000)
    found = dba(rows_in, scores, rows, 10, decaying)
    torch.testing.assert_close(found, whole, atol=1e-7, rtol=0)


def test_the_result_may_be_written_where_the_caller_wants_it(tmp_path):
    rows_in = features(50, 7)
    scores, rows = neighbours(rows_in, rows_in, 10)
    path = tmp_path / "vectors.npy"
    mapped = np.lib.format.open_memmap(
        path, "w+", np.dtype(np.float16), tuple(rows_in.shape)
    )
    dba(rows_in, scores, rows, out=torch.from_numpy(mapped))
    expected = dba(rows_in, scores, rows).half()
    assert torch.equal(torch.from_numpy(np.load(path)), expected)


def test_nothing_is_expanded_in_place(search):
    queries, index, scores, rows = search
    weights = torch.ones_like(scores)
    for out in (queries, index[:30]):
        with pytest.raises(ValueError, match="not the features themselves"):
            expand(queries, index, rows, weights, out=out)


def test_expansions_leave_their_inputs_as_they_were(search):
    before = [each.clone() for each in search]
    alpha_qe(*search)
    queries, index, scores, rows = search
    expand(queries, index, *verified(scores, rows, rows * 10))
    own = neighbours(index, index, 10)
    copies = [each.clone() for each in own]
    dba(index, *own, 10, powered(3), labels=torch.zeros(200).long())
    assert all(map(torch.equal, search, before)) and all(map(torch.equal, own, copies))


def test_what_does_not_fit_is_refused(search):
    queries, index, scores, rows = search
    with pytest.raises(
        ValueError, match="^features of 16 dimensions, neighbours of 8$"
    ):
        alpha_qe(queries, index[:, :8], scores, rows)
    with pytest.raises(ValueError, match="of an index of 3 rows"):
        alpha_qe(queries, index[:3], scores, rows)
    with pytest.raises(ValueError, match="they must be as many"):
        expand(queries[:5], index, rows, scores)
    with pytest.raises(ValueError, match="^k is 0; it must be at least 1, the row"):
        dba(index, *neighbours(index, index, 5), 0)
    with pytest.raises(ValueError, match="they must be of one shape"):
        verified(scores, rows, rows[:, :2])
