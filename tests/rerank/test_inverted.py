import pytest
import torch

from kit.rerank.inverted import invert, ranges


def test_members_are_the_rows_that_carry_a_label():  # worked by hand
    inverted = invert(torch.tensor([2, -1, 0, 2, 5, 0, 2]))
    owners, rows = inverted.members(torch.tensor([2, 9, -1, 0, 2, 3]))
    assert owners.tolist() == [0, 0, 0, 3, 3, 4, 4, 4]
    assert rows.tolist() == [0, 3, 6, 2, 5, 0, 3, 6]


@pytest.mark.parametrize("labels", [[], [-1, -1], [-1]])
def test_without_labels_nothing_has_members(labels):
    owners, rows = invert(torch.tensor(labels).long()).members(torch.tensor([0, 1, -1]))
    assert len(owners) == len(rows) == 0


def test_members_match_a_search_through_all_rows():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 30, (500,), generator=random)
    asked = torch.randint(-2, 40, (60,), generator=random)
    owners, rows = invert(labels).members(asked)
    expected = [
        (at, row)
        for at, label in enumerate(asked.tolist())
        for row in range(500)
        if label >= 0 and labels[row] == label
    ]
    assert list(zip(owners.tolist(), rows.tolist(), strict=True)) == expected


def test_ranges_are_laid_out_one_after_another():
    owners, places = ranges(torch.tensor([7, 3, 0]), torch.tensor([2, 0, 3]))
    assert owners.tolist() == [0, 0, 2, 2, 2]
    assert places.tolist() == [7, 8, 0, 1, 2]
