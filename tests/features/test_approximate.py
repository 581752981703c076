import numpy as np
import pytest
import torch

from kit.features.approximate import int8_copy, knn_faiss, savings
from kit.features.search import knn

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def near():
    """Queries and rows of some clusters."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 8, generator=random)
    rows = centres.repeat(6, 1) + 0.3 * torch.randn(1200, 8, generator=random)
    query = centres[:30] + 0.3 * torch.randn(30, 8, generator=random)
    return [torch.nn.functional.normalize(each).half() for each in (query, rows)]


def share(found, exact):
    shared = (found[:, :, None] == exact[:, None, :]).any(dim=2)
    return shared.float().mean().item()


@pytest.mark.parametrize("k", [1, 10, 1200])
def test_a_flat_index_finds_the_exact_neighbours(near, k):
    found, exact = knn_faiss(*near, k), knn(*near, k)
    assert torch.equal(found.rows, exact.rows)
    assert torch.equal(found.scores, exact.scores)


def test_product_codes_find_most_and_score_them_exactly(near):
    options = {"kind": "ivfpq", "lists": 16, "codes": 2}
    found, exact = knn_faiss(*near, 10, probe=16, refine=20, **options), knn(*near, 10)
    assert share(found.rows, exact.rows) > 0.95
    scores = near[0].double() @ near[1].double().T
    assert torch.equal(found.scores, scores.gather(1, found.rows).float())
    fewer = knn_faiss(*near, 10, probe=1, refine=1, **options)
    assert share(fewer.rows, exact.rows) < share(found.rows, exact.rows)


def test_a_cell_with_few_rows_leaves_places_empty(near):
    found = knn_faiss(*near, 1000, "ivfpq", lists=16, codes=1, probe=1, refine=1)
    empty = found.rows < 0
    assert empty.any() and (found.scores[empty] == -torch.inf).all()
    assert not (found.scores[~empty] == -torch.inf).any()


def test_eight_bits_stay_within_half_a_step(near, tmp_path):
    path = int8_copy(near[1], tmp_path)
    codes, scales = np.load(path), np.load(tmp_path / "scales.npy")
    assert codes.dtype == np.int8 and codes.shape == near[1].shape
    restored = scales[:, None].astype(np.float64) * codes
    off = np.abs(restored - near[1].double().numpy()).max(axis=1)
    assert (off <= 0.5001 * scales).all()
    assert (np.abs(codes).max(axis=1) == 127).all()


def test_rows_of_zeros_are_zeros_in_eight_bits(tmp_path):
    path = int8_copy(torch.zeros(3, 8, dtype=torch.float16), tmp_path)
    assert not np.load(path).any() and not np.load(tmp_path / "scales.npy").any()


def test_what_a_smaller_copy_costs_is_printed_beside_the_saving(near, capsys):
    int8, small, large = savings(*near, 10, codes=(1, 4, 5))
    printed = capsys.readouterr().out.splitlines()
    assert [each.name for each in (int8, small, large)] == ["int8", "PQ1", "PQ4"]
    assert (int8.bytes_a_row, small.bytes_a_row, small.times_smaller) == (12, 1, 16)
    assert small.recall < large.recall < int8.recall <= 1
    assert int8.recall > 0.97
    assert f"recall@10 {small.recall:.4f}" in printed[1] and "16.0x" in printed[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda near: knn_faiss(*near, 1, "hnsw"), "choose from flat, ivfpq"),
        (lambda near: knn_faiss(*near, 0), "k is 0; it must be at least 1"),
        (lambda near: knn_faiss(near[0], near[1][:0], 1), "the database has no rows"),
        (
            lambda near: knn_faiss(*near, 1, "ivfpq", codes=5),
            "5 codes do not divide 8 dimensions",
        ),
    ],
)
def test_what_faiss_cannot_answer_is_refused(near, call, words):
    with pytest.raises(ValueError, match=words):
        call(near)


def test_faiss_is_told_to_find_no_more_rows_than_there_are(near):
    assert knn_faiss(near[0], near[1][:5], 9).rows.shape == (30, 5)


@pytest.mark.parametrize("side", ["queries", "rows"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0])
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_a_row_that_is_no_feature_must_be_named(near, kind, side, value):
    query, rows = (each.clone() for each in near)
    (query if side == "queries" else rows)[7, 3] = value
    with pytest.raises(ValueError, match="row 7 of the features"):
        knn_faiss(query, rows, 5, kind, codes=2)


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (100, {}, "100 rows are fewer than the 256 centroids"),
        (300, {"lists": 301}, "301 lists are more than the 300 rows"),
        (300, {"codes": 3}, "3 codes do not divide 8 dimensions"),
        (300, {"codes": 0}, "codes 0"),
        (300, {"probe": 0}, "probe 0"),
        (300, {"lists": 0}, "lists is 0"),
        (300, {"refine": -1}, "refine -1"),
    ],
)
def test_codes_that_cannot_be_learnt_must_be_refused(near, count, options, words):
    with pytest.raises(ValueError, match=words):
        knn_faiss(near[0], near[1][:count], 5, "ivfpq", **{"codes": 2} | options)
