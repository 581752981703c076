import pytest
import torch

from kit.rerank.addends import Addends, Members


def members(starts, rows, values):
    return Members(
        torch.tensor(starts),
        torch.tensor(rows),
        torch.tensor(values, dtype=torch.float),
    )


def some() -> Addends:
    return Addends(
        by_row=torch.tensor([0.1, -0.2, 0.0, 0.3]),
        groups=torch.tensor([1, -1, 0, 1]),
        by_group=torch.tensor([[0.5, 0.1], [0.2, 0.3], [0.0, -0.4]]),
        members=members([0, 2, 2, 5], [3, 0, 1, 2, 3], [1, 2, 3, 4, 5]),
    )


@pytest.mark.parametrize(
    ("queries", "starts", "rows", "values"),
    [
        (slice(0, 1), [0, 2], [3, 0], [1, 2]),
        (slice(1, 2), [0, 0], [], []),
        (slice(1, 3), [0, 0, 3], [1, 2, 3], [3, 4, 5]),
        (slice(2, 9), [0, 3], [1, 2, 3], [3, 4, 5]),
        (slice(0, 3), [0, 2, 2, 5], [3, 0, 1, 2, 3], [1, 2, 3, 4, 5]),
    ],
)
def test_addends_of_some_queries_are_theirs(queries, starts, rows, values):
    cut = some().of(queries)
    assert cut.members.starts.tolist() == starts
    assert cut.members.rows.tolist() == rows
    assert cut.members.values.tolist() == values
    assert torch.equal(cut.by_group, some().by_group[queries])
    assert torch.equal(cut.by_row, some().by_row)
    assert torch.equal(cut.groups, some().groups)


def test_only_neighbouring_queries_are_cut():
    with pytest.raises(ValueError, match="only a step of 1 is cut"):
        some().of(slice(0, 3, 2))


def test_addends_that_fit_are_accepted():
    some().check(3, 4)
    Addends().check(7, 9)


@pytest.mark.parametrize(
    ("queries", "index", "words"),
    [
        (3, 5, "by_row of the addends is for 4 index rows, not 5"),
        (2, 4, "by_group of the addends is for 3 queries, not 2"),
    ],
)
def test_addends_of_other_sizes_are_refused(queries, index, words):
    with pytest.raises(ValueError, match=words):
        some().check(queries, index)


def test_members_of_other_queries_are_refused():
    with pytest.raises(
        ValueError, match="members of the addends is for 3 queries, not 4"
    ):
        Addends(members=some().members).check(4, 4)


@pytest.mark.parametrize(
    ("addends", "words"),
    [
        (
            lambda: Addends(groups=torch.tensor([0])),
            "groups and by_group come together",
        ),
        (
            lambda: Addends(by_group=torch.ones(1, 1)),
            "groups and by_group come together",
        ),
        (lambda: Addends(by_row=torch.tensor([torch.nan])), "by_row .* not finite"),
        (
            lambda: Addends(members=members([0, 1], [0], [torch.inf])),
            "values of members .* not finite",
        ),
        (lambda: Addends(members=members([1, 1], [0], [1])), "starts must rise from 0"),
        (lambda: Addends(members=members([0, 2], [0], [1])), "starts must rise from 0"),
        (lambda: Addends(members=members([0, 2, 1], [0], [1])), "starts must rise"),
        (lambda: Addends(members=members([0, 1], [0], [1, 2])), "which are as many"),
        (
            lambda: Addends(members=members([0, 2], [3, 3], [1, 2])).check(1, 4),
            "query 0 has row 3 twice",
        ),
        (
            lambda: Addends(members=members([0, 1], [4], [1])).check(1, 4),
            r"rows of members of the addends has 4, which is not in 0\.\.3",
        ),
        (
            lambda: Addends(groups=torch.tensor([2]), by_group=torch.ones(1, 2)).check(
                1, 1
            ),
            r"groups of the addends has 2, which is not in -1\.\.1",
        ),
    ],
)
def test_addends_that_make_no_sense_are_refused(addends, words):
    with pytest.raises(ValueError, match=words):
        addends()


def test_a_row_may_be_a_member_of_several_queries():
    Addends(members=members([0, 1, 2], [3, 3], [1, 2])).check(2, 4)
