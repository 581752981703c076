import pytest
import torch

from kit.rerank.addends import Addends
from kit.rerank.sums import members, weighted_sum
from tests.rerank.published import matrix

QUERIES, INDEX = 4, 30


def some(seed, by_row=True, groups=True, single=True):
    random = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    count = 3 + seed
    pairs = torch.randperm(QUERIES * INDEX, generator=random)[:40]
    return Addends(
        torch.randn(INDEX, generator=random) if by_row else None,
        whole(-1, count, INDEX) if groups else None,
        torch.randn(QUERIES, count, generator=random) if groups else None,
        members(
            pairs // INDEX, pairs % INDEX, torch.randn(40, generator=random), QUERIES
        )
        if single
        else None,
    )


def test_values_of_one_pair_add_up():  # worked by hand
    found = members(
        torch.tensor([2, 0, 2, 0]),
        torch.tensor([5, 9, 5, 1]),
        torch.tensor([1.0, 2.0, 4.0, 8.0]),
        4,
    )
    assert found.starts.tolist() == [0, 2, 2, 3, 3]
    assert found.rows.tolist() == [1, 9, 5]
    assert found.values.tolist() == [8, 2, 5]


def test_nobody_has_no_members():
    none = torch.zeros(0, dtype=torch.long)
    found = members(none, none, torch.zeros(0), 3)
    assert found.starts.tolist() == [0, 0, 0, 0]
    assert len(found.rows) == len(found.values) == 0


@pytest.mark.parametrize(
    "parts",
    [
        [some(0)],
        [some(0), some(1)],
        [some(0), some(1), some(2)],
        [some(0, groups=False), some(1, by_row=False), some(2, single=False)],
        [some(0, True, False, False), some(1, True, False, False)],
        [Addends()],
    ],
)
def test_the_sum_of_addends_is_that_of_their_matrices(parts):
    weights = [0.5, -2.0, 3.0][: len(parts)]
    total = weighted_sum(parts, weights)
    expected = sum(
        weight * matrix(part, QUERIES, INDEX)
        for part, weight in zip(parts, weights, strict=True)
    )
    torch.testing.assert_close(matrix(total, QUERIES, INDEX), expected)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 weights for the addends of 1 models"):
        weighted_sum([some(0)], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 weights"):
        weighted_sum([], [])
