from itertools import permutations

import pytest
import torch

from kit.rerank.landmark_country import (
    NONE,
    PUBLISHED,
    Tags,
    Votes,
    Weights,
    addends,
    agreement,
    bonus,
    class_means,
    gate,
    vote,
)
from tests.rerank.published import matrix


def vote_by_hand(scores, labels):
    """For each query {label: share of the score}, one neighbour after another."""
    queries = []
    for row, names in zip(scores.tolist(), labels.tolist(), strict=True):
        summed = {}
        for score, name in zip(row, names, strict=True):
            if name >= 0:
                summed[name] = summed.get(name, 0.0) + max(score, 0.0)
        total = sum(summed.values())
        queries.append(
            {name: s / total if total else 0.0 for name, s in summed.items()}
        )
    return queries


def as_shares(votes: Votes) -> list[dict[int, float]]:
    return [
        {label: weight for label, weight in zip(*row, strict=True) if label >= 0}
        for row in zip(votes.labels.tolist(), votes.weights.tolist(), strict=True)
    ]


def agreement_by_hand(shares, index_labels):
    return torch.tensor(
        [
            [share.get(label, 0.0) if label >= 0 else 0.0 for label in index_labels]
            for share in shares
        ]
    )


@pytest.fixture(params=[1, 3, 8])
def neighbours(request):
    """Scores (200, K), some negative, and labels (200, K), many equal and some absent."""
    random = torch.Generator().manual_seed(request.param)
    shape = (200, request.param)
    scores = torch.rand(shape, generator=random) * 1.5 - 0.5
    labels = torch.randint(-1, 4, shape, generator=random)
    return scores.sort(dim=1, descending=True).values, labels


# vote


def test_a_vote_is_the_share_of_the_score():  # worked by hand
    scores = torch.tensor([[0.8, 0.6, 0.2], [0.9, 0.5, 0.1], [0.4, -0.2, -0.3]])
    labels = torch.tensor([[7, 2, 7], [3, -1, 5], [1, 1, 4]])
    votes = vote(scores, labels)
    assert votes.labels.tolist() == [[7, 2, -1], [3, -1, 5], [1, -1, 4]]
    torch.testing.assert_close(
        votes.weights,
        torch.tensor([[1.0 / 1.6, 0.6 / 1.6, 0], [0.9, 0, 0.1], [1, 0, 0]]),
    )


def test_vote_matches_its_definition(neighbours):
    found = as_shares(vote(*neighbours))
    for shares, expected in zip(found, vote_by_hand(*neighbours), strict=True):
        assert shares == pytest.approx(expected, abs=1e-6)


def test_votes_are_shares(neighbours):
    votes = vote(*neighbours)
    assert (votes.weights >= 0).all()
    assert not votes.weights[votes.labels == -1].any()
    anybody = (votes.weights > 0).any(dim=1)
    torch.testing.assert_close(votes.weights.sum(dim=1), anybody.float())
    for row in votes.labels.tolist():
        present = [label for label in row if label >= 0]
        assert len(present) == len(set(present))


def test_labels_below_0_and_negative_scores_do_not_vote():
    votes = vote(
        torch.tensor([[0.9, 0.5], [-0.1, -0.2]]), torch.tensor([[-1, -7], [4, 5]])
    )
    assert not votes.weights.any()
    assert votes.labels[0].tolist() == [-1, -1]


def test_the_order_of_neighbours_does_not_matter():
    scores, labels = torch.tensor([[0.9, 0.6, 0.3, 0.1]]), torch.tensor([[4, 2, 4, -1]])
    expected = as_shares(vote(scores, labels))[0]
    assert expected == pytest.approx({4: 1.2 / 1.8, 2: 0.6 / 1.8})
    for order in permutations(range(4)):
        votes = vote(scores[:, list(order)], labels[:, list(order)])
        assert as_shares(votes)[0] == pytest.approx(expected)


def test_the_numbers_of_the_labels_do_not_matter(neighbours):
    scores, labels = neighbours
    renamed = torch.tensor([90, 3, 500_000, 0, -1])  # the last one is for -1
    votes, others = vote(scores, labels), vote(scores, renamed[labels])
    assert torch.equal(others.weights, votes.weights)
    assert torch.equal(others.labels, renamed[votes.labels])


def test_the_length_of_the_scores_does_not_matter(neighbours):
    scores, labels = neighbours
    torch.testing.assert_close(
        vote(0.01 * scores, labels).weights, vote(scores, labels).weights
    )


def test_a_query_s_vote_does_not_depend_on_the_other_queries(neighbours):
    scores, labels = neighbours
    together = vote(scores, labels)
    alone = vote(scores[17:18], labels[17:18])
    assert torch.equal(alone.weights[0], together.weights[17])
    assert torch.equal(alone.labels[0], together.labels[17])


def test_vote_leaves_its_inputs_as_they_were(neighbours):
    before = [tensor.clone() for tensor in neighbours]
    vote(*neighbours)
    assert all(map(torch.equal, neighbours, before))


# agreement


def test_agreement_is_the_share_of_votes():  # worked by hand
    votes = Votes(
        torch.tensor([[3, 8, -1], [9, -1, -1]]),
        torch.tensor([[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]]),
    )
    shares = agreement(votes, torch.tensor([3, 8, 9, -1]))
    expected = torch.tensor([[0.8, 0.2, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(shares, expected)


def test_agreement_matches_its_definition(neighbours):
    index = torch.arange(-1, 6).repeat(2)
    expected = agreement_by_hand(vote_by_hand(*neighbours), index.tolist())
    torch.testing.assert_close(agreement(vote(*neighbours), index), expected)


def test_an_unknown_label_agrees_with_nothing():
    votes = Votes(torch.tensor([[-1, 2]]), torch.tensor([[0.5, 0.5]]))
    assert agreement(votes, torch.tensor([-1, 2])).tolist() == [[0, 0.5]]


def test_agreement_leaves_its_inputs_as_they_were(neighbours):
    votes, index = vote(*neighbours), torch.arange(-1, 6)
    before = votes.labels.clone(), votes.weights.clone(), index.clone()
    agreement(votes, index)
    assert all(map(torch.equal, (votes.labels, votes.weights, index), before))


# bonus


@pytest.fixture
def tags():
    """Two queries in front of four index images: landmarks 0..2, countries 0..1."""
    return Tags(
        query_landmark=Votes(
            torch.tensor([[0, 1], [2, -1]]), torch.tensor([[0.7, 0.3], [1.0, 0.0]])
        ),
        query_country=Votes(
            torch.tensor([[1, 0], [-1, -1]]), torch.tensor([[0.9, 0.1], [0.0, 0.0]])
        ),
        index_landmark=torch.tensor([0, 1, 2, -1]),
        index_country=torch.tensor([1, 0, -1, 1]),
    )


def test_the_bonus_is_what_both_agreements_are_worth(tags):  # worked by hand
    expected = torch.tensor([[0.7 + 0.09, 0.3 + 0.01, 0, 0.09], [0, 0, 1, 0]])
    torch.testing.assert_close(bonus(tags, PUBLISHED), expected)
    expected = torch.tensor([[0.14 + 0.45, 0.06 + 0.05, 0, 0.45], [0, 0, 0.2, 0]])
    torch.testing.assert_close(bonus(tags, Weights(0.2, 0.5)), expected)


def test_the_published_example_is_ordered_as_its_authors_drew_it():
    # landmark Chenghuangmiao .7, China .9; the third image is of India, the last of Pingyao
    landmark = Votes(torch.tensor([[4, 9]]), torch.tensor([[0.7, 0.3]]))
    country = Votes(torch.tensor([[1, 3]]), torch.tensor([[0.9, 0.1]]))
    tags = Tags(
        landmark, country, torch.tensor([4, 4, 6, 8]), torch.tensor([1, 1, 2, 1])
    )
    scores = torch.tensor([[0.7, 0.1, 0.6, 0.5]])
    a, b = 1.0, 0.12  # with the shipped 0.1 .59 stays below .60
    reranked = scores + bonus(tags, Weights(a, b))
    expected = [0.7 + 0.7 * a + 0.9 * b, 0.1 + 0.7 * a + 0.9 * b, 0.6, 0.5 + 0.9 * b]
    torch.testing.assert_close(reranked, torch.tensor([expected]))
    assert reranked.argsort(descending=True).tolist() == [[0, 1, 3, 2]]


def test_weights_of_0_are_worth_nothing(tags):
    assert not bonus(tags, NONE).any()
    assert (PUBLISHED.landmark, PUBLISHED.country) == (1.0, 0.1)


def test_a_unanimous_vote_is_worth_the_whole_weight():
    votes = vote(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[5, 5, 5]]))
    tags = Tags(votes, votes, torch.tensor([5]), torch.tensor([5]))
    torch.testing.assert_close(bonus(tags, PUBLISHED), torch.tensor([[1.1]]))


def test_tags_of_a_part_give_that_part_of_the_bonus(tags):
    whole = bonus(tags, PUBLISHED)
    for queries in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for index in (slice(0, 3), slice(3, 4), slice(1, 3)):
            part = bonus(tags.of(queries, index), PUBLISHED)
            assert torch.equal(part, whole[queries, index])


# addends


@pytest.mark.parametrize("weights", [PUBLISHED, Weights(0.2, 0.5), NONE])
def test_addends_are_the_bonus_without_its_matrix(tags, neighbours, weights):
    found = matrix(addends(tags, weights), 2, 4)
    torch.testing.assert_close(found.float(), bonus(tags, weights))
    scores, labels = neighbours
    index = torch.arange(-1, 6).repeat(3)
    many = Tags(
        vote(scores, labels), vote(scores, labels.flip(1)), index, index.flip(0)
    )
    found = matrix(addends(many, weights), 200, 21)
    torch.testing.assert_close(found.float(), bonus(many, weights))


def test_members_are_only_images_of_voted_landmarks(tags):
    starts, rows, _ = addends(tags, PUBLISHED).members
    assert starts.tolist() == [0, 2, 3] and rows.tolist() == [0, 1, 2]


def test_an_index_without_labels_gets_nothing(tags):
    nobody = torch.full((4,), -1)
    none = Tags(tags.query_landmark, tags.query_country, nobody, nobody)
    assert not matrix(addends(none, PUBLISHED), 2, 4).any()


# gate


def test_a_vote_below_the_confidence_leaves_the_list_alone(tags):
    votes = Votes(
        torch.tensor([[4, 2, 9], [4, 2, 9], [4, 2, 9]]),
        torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.3, 0.3], [0.5, 0.5, 0.0]]),
    )
    gated = gate(votes, 0.5)
    assert torch.equal(gated.labels, votes.labels)
    assert torch.equal(gated.weights[[0, 2]], votes.weights[[0, 2]])
    assert not gated.weights[1].any()
    assert not agreement(gated, torch.tensor([4, 2, 9]))[1].any()
    starts = addends(
        Tags(gated, gated, torch.tensor([4]), torch.tensor([0])), PUBLISHED
    )
    assert starts.members.starts.tolist() == [0, 1, 1, 2]


def test_confidence_may_be_anything():
    votes = Votes(torch.tensor([[4], [5]]), torch.tensor([[1.0], [1.0]]))
    gated = gate(votes, 0.7, confidence=torch.tensor([0.69, 0.7]))
    assert gated.weights.tolist() == [[0], [1]]
    assert votes.weights.tolist() == [[1], [1]]
    assert gate(votes, 0.0).weights.tolist() == [[1], [1]]


# class means


def test_class_means_match_their_definition():
    random = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(
        torch.randn(90, 8, generator=random), dim=1
    )
    labels = torch.randint(-1, 40, (90,), generator=random) * 7
    labels[labels < 0] = -1
    for size in (90, 7, 1):
        means, names = class_means(features.half().split(size), labels)
        assert names.tolist() == sorted(set(labels.tolist()) - {-1})
        for mean, name in zip(means, names, strict=True):
            expected = features.half()[labels == name].double().mean(0)
            torch.testing.assert_close(mean.double(), expected / expected.norm())


def test_a_class_that_cancels_out_has_no_direction():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    means, names = class_means([features], torch.tensor([3, 3]))
    assert means.tolist() == [[0, 0]] and names.tolist() == [3]


@pytest.mark.parametrize("rows", [1, 3])
def test_class_means_need_a_label_for_every_row(rows):
    with pytest.raises(ValueError, match=f"features of {rows} rows, labels of 2"):
        class_means([torch.ones(rows, 2)], torch.tensor([1, 1]))
