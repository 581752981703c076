import math

import numpy as np
import pytest
import torch

from kit.features.search import knn, top


def whole_numbers(*shape, seed=0, largest=3):
    """Small integers: products are exact in float32 and many are equal."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=random).float()


def by_hand(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, larger first, of equal ones the lower column, by sorting it all."""
    columns = np.arange(scores.shape[1])
    rows = np.array([np.lexsort((columns, -(row + 0.0)))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def agrees(found, expected):
    """Scores (0.0 is -0.0) and rows are those expected, to the bit."""
    scores, rows = found
    assert torch.equal(rows, torch.from_numpy(expected[1]))
    assert torch.equal(scores, torch.from_numpy(expected[0]).float())


# knn


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_matches_sorting_every_score(k):
    queries, database = whole_numbers(20, 4), whole_numbers(150, 4, seed=1)
    scores = queries.double().numpy() @ database.double().numpy().T
    agrees(knn(queries, [database], k), by_hand(scores, k))


def test_knn_matches_sorting_every_score_of_unit_vectors():
    random = torch.Generator().manual_seed(0)
    queries, database = (
        torch.nn.functional.normalize(torch.randn(n, 16, generator=random))
        for n in (10, 200)
    )
    exact = queries.double().numpy() @ database.double().numpy().T
    scores, rows = knn(queries, database.split(64), 10)
    expected, at = by_hand(exact, 10)
    assert np.array_equal(rows.numpy(), at)
    torch.testing.assert_close(scores, torch.from_numpy(expected).float())


@pytest.mark.parametrize("size", [1, 2, 7, 50, 149, 150, 1000])
def test_knn_does_not_depend_on_the_block_size(size):
    queries, database = whole_numbers(20, 4), whole_numbers(150, 4, seed=1)
    scores, rows = knn(queries, [database], 9)
    again, at = knn(queries, iter(database.split(size)), 9)
    assert torch.equal(again, scores) and torch.equal(at, rows)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_of_equal_neighbours_the_first_row_wins(size):
    one = whole_numbers(1, 4) + 5
    database = torch.cat([whole_numbers(3, 4, seed=1), one.repeat(37, 1)])
    _, rows = knn(one, database.split(size), 12)
    assert rows.tolist() == [list(range(3, 15))]


def test_knn_of_one_query_does_not_depend_on_the_others():
    queries, database = whole_numbers(20, 4), whole_numbers(150, 4, seed=1)
    scores, rows = knn(queries, [database], 9)
    for number in (0, 7, 19):
        one, at = knn(queries[number : number + 1], [database], 9)
        assert torch.equal(one[0], scores[number]) and torch.equal(at[0], rows[number])


def test_half_precision_blocks_are_compared_in_float32():
    queries = torch.tensor([[1.0, 1.0]])
    database = torch.tensor([[2048.0, 0.5], [2048.0, 1.0]], dtype=torch.float16)
    scores, rows = knn(queries, [database], 2)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[2049.0, 2048.5]] and rows.tolist() == [[1, 0]]


def test_a_database_of_fewer_rows_gives_them_all():
    queries, database = whole_numbers(5, 4), whole_numbers(7, 4, seed=1)
    scores, rows = knn(queries, database.split(3), 100)
    assert scores.shape == rows.shape == (5, 7)
    assert rows.sort().values.tolist() == [list(range(7))] * 5


def test_knn_refuses_what_it_cannot_answer():
    queries, database = whole_numbers(5, 4), whole_numbers(7, 4, seed=1)
    with pytest.raises(ValueError, match="^k is 0; it must be at least 1$"):
        knn(queries, [database], 0)
    with pytest.raises(ValueError, match="queries have 4 dimensions, the database 3"):
        knn(queries, [database, database[:, :3]], 2)
    with pytest.raises(ValueError, match="^the database has no rows$"):
        knn(queries, [], 2)
    with pytest.raises(ValueError, match="^the database has no rows$"):
        knn(queries, [database[:0]], 2)


def test_knn_leaves_its_inputs_as_they_were():
    queries, database = whole_numbers(5, 4), whole_numbers(7, 4, seed=1)
    before = queries.clone(), database.clone()
    knn(queries, [database], 3)
    assert torch.equal(queries, before[0]) and torch.equal(database, before[1])


def test_no_more_than_a_block_is_asked_for_at_a_time():
    asked = []

    def database():
        for number in range(5):
            asked.append(number)
            yield torch.full((3, 1), float(number))

    blocks = database()
    _, rows = knn(torch.ones(1, 1), blocks, 2)
    assert asked == [0, 1, 2, 3, 4]
    assert rows.tolist() == [[12, 13]]


# top

SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf),
    *(1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1 + 2**-23),
]


@pytest.mark.parametrize("k", [1, 4, 30, 300])
def test_top_matches_sorting_where_floats_are_peculiar(k):
    random = np.random.default_rng(0)
    scores = random.choice(np.array(SPECIAL, np.float32), (40, 30))
    agrees(top(torch.from_numpy(scores), k), by_hand(scores, k))


@pytest.mark.parametrize("k", [1, 10, 100])
def test_top_matches_sorting_where_many_are_equal(k):
    scores = whole_numbers(30, 400, largest=2)
    agrees(top(scores, k), by_hand(scores.numpy(), k))


def test_top_matches_sorting_of_any_floats():
    bits = np.random.default_rng(0).integers(0, 2**32, 6000, dtype=np.uint32)
    scores = bits.view(np.float32)
    scores = scores[~np.isnan(scores)][:5500].reshape(10, 550)
    agrees(top(torch.from_numpy(scores), 550), by_hand(scores, 550))


def test_minus_zero_is_equal_to_zero():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert top(scores, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_nothing_is_worse_than_minus_infinity():
    scores = torch.tensor([[-math.inf, -math.inf, -3.4e38]])
    values, columns = top(scores, 3)
    assert columns.tolist() == [[2, 0, 1]]
    assert values[0, 1:].tolist() == [-math.inf, -math.inf]


def test_top_of_a_transposed_view_is_that_of_its_copy():
    scores = whole_numbers(9, 9)
    agrees(top(scores.T, 5), by_hand(scores.T.contiguous().numpy(), 5))


def test_top_leaves_its_input_as_it_was():
    scores = whole_numbers(4, 9)
    before = scores.clone()
    top(scores, 3)
    assert torch.equal(scores, before)
