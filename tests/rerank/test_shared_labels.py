import pytest
import torch

from kit.rerank.landmark_country import Votes, vote
from kit.rerank.shared_labels import (
    common_share,
    same_label,
    same_label_bonus,
    soft_labels,
)
from tests.rerank.published import matrix


def votes(count, width, seed, most=6):
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, width, generator=random) - 0.2
    return vote(scores, torch.randint(-1, most, (count, width), generator=random))


def common_by_hand(query, index):
    full = torch.zeros(len(query.labels), len(index.labels), dtype=torch.float64)
    for q, theirs in enumerate(query.labels.tolist()):
        for i, ours in enumerate(index.labels.tolist()):
            for a, label in enumerate(theirs):
                for b, other in enumerate(ours):
                    if label == other and label >= 0:
                        worth = (
                            query.weights[q, a].double() * index.weights[i, b].double()
                        )
                        full[q, i] += worth
    return full


@pytest.mark.parametrize(("k", "width"), [(5, 5), (1, 5), (5, 1)])
def test_the_common_share_matches_its_definition(k, width):
    query, index = votes(20, k, 0), votes(60, width, 1)
    expected = common_by_hand(query, index)
    torch.testing.assert_close(common_share(query, index).double(), expected)
    found = matrix(soft_labels(query, index, 0.7), 20, 60)
    torch.testing.assert_close(found, 0.7 * expected)
    assert expected.any()


def test_equal_unanimous_votes_share_everything():
    one = Votes(torch.tensor([[3, -1]]), torch.tensor([[1.0, 0.0]]))
    assert common_share(one, one).tolist() == [[1]]
    other = Votes(torch.tensor([[4, -1]]), torch.tensor([[1.0, 0.0]]))
    assert common_share(one, other).tolist() == [[0]]


def test_one_label_a_side_is_a_member_only_where_both_have_it():
    query = Votes(torch.tensor([[3, 5], [-1, 8]]), torch.tensor([[0.5, 0.5], [0, 1.0]]))
    index = Votes(torch.tensor([[5, -1], [3, 5]]), torch.tensor([[1.0, 0], [0.2, 0.8]]))
    starts, rows, values = soft_labels(query, index).members
    assert starts.tolist() == [0, 2, 2] and rows.tolist() == [0, 1]
    torch.testing.assert_close(values.float(), torch.tensor([0.5, 0.5]))


def test_the_winners_bonus_matches_its_definition():
    random = torch.Generator().manual_seed(0)
    query = torch.randint(-1, 5, (20,), generator=random)
    index = torch.randint(-1, 5, (60,), generator=random)
    cosines = torch.rand(60, generator=random) * 1.5 - 0.5
    expected = torch.tensor(
        [
            [
                0.8 * c if q == i and q >= 0 else -0.2 * c
                for i, c in zip(names, worth, strict=True)
            ]
            for names, worth in [(index.tolist(), cosines.tolist())]
            for q in query.tolist()
        ]
    )
    torch.testing.assert_close(
        same_label_bonus(query, index, cosines, 0.8, 0.2), expected
    )
    found = matrix(same_label(query, index, cosines, 0.8, 0.2), 20, 60)
    torch.testing.assert_close(found.float(), expected)


def test_the_winners_parameters_are_one_and_a_tenth():
    query, index = torch.tensor([4, 2]), torch.tensor([4, 7])
    cosines = torch.tensor([0.5, 0.8])
    expected = torch.tensor([[0.5, -0.08], [-0.05, -0.08]])
    torch.testing.assert_close(same_label_bonus(query, index, cosines), expected)
    found = matrix(same_label(query, index, cosines), 2, 2).float()
    torch.testing.assert_close(found, expected)


def test_inputs_are_left_as_they_were():
    query, index = votes(20, 5, 0), votes(60, 5, 1)
    names, cosines = index.labels[:, 0], index.weights[:, 0]
    given = query.labels, query.weights, index.labels, index.weights
    before = [each.clone() for each in given]
    soft_labels(query, index)
    common_share(query, index)
    same_label(query.labels[:, 0], names, cosines)
    assert all(map(torch.equal, given, before))
