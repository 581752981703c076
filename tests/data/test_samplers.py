import numpy as np
import pytest

from kit.data.samplers import Batches, shuffle

CASES = [
    (12, 4, 1),
    (12, 4, 2),
    (13, 4, 4),
    (10, 6, 3),
    (3, 8, 2),
    (1, 1, 1),
    (7, 7, 7),
]


def given(*args, **options):
    return list(Batches(*args, **options))


def rows(batches):
    return [row for batch in batches for _, row in batch]


@pytest.mark.parametrize("length", [1, 2, 50])
def test_shuffle_has_every_row_once(length):
    assert sorted(shuffle(length, 0, 0).tolist()) == list(range(length))


def test_every_seed_and_epoch_has_an_order_of_its_own():
    orders = [shuffle(50, s, e).tolist() for s in range(4) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert shuffle(50, 2, 3).tolist() == shuffle(50, 2, 3).tolist()
    np.random.seed(1)
    assert shuffle(50, 2, 3).tolist() == orders[2 * 4 + 3]


@pytest.mark.parametrize(("length", "batch", "world"), CASES)
def test_an_epoch_has_every_row_once_and_fills_its_last_batch_from_its_start(
    length, batch, world
):
    steps = -(-length // batch)
    batches = given(length, batch, 3, seed=5)
    assert len(batches) == 3 * steps
    for epoch in range(3):
        part = batches[epoch * steps : (epoch + 1) * steps]
        assert all(len(each) == batch for each in part)
        assert {number for each in part for number, _ in each} == {epoch}
        seen = rows(part)
        order = shuffle(length, 5, epoch).tolist()
        assert seen == [order[place % length] for place in range(steps * batch)]
        assert sorted(seen[:length]) == list(range(length))


@pytest.mark.parametrize(("length", "batch", "world"), CASES)
def test_ranks_side_by_side_are_the_batch_of_one_process(length, batch, world):
    alone = given(length, batch, 2, seed=1)
    ranks = [
        given(length, batch, 2, seed=1, rank=rank, world=world) for rank in range(world)
    ]
    together = [
        [key for part in parts for key in part] for parts in zip(*ranks, strict=True)
    ]
    assert together == alone
    assert all(len(part) == batch // world for rank in ranks for part in rank)


def test_ranks_share_no_row_in_an_epoch_without_a_filled_batch():
    seen = [set(rows(given(24, 6, 1, seed=0, rank=r, world=3))) for r in range(3)]
    assert [len(each) for each in seen] == [8, 8, 8]
    assert set.union(*seen) == set(range(24))


@pytest.mark.parametrize(("length", "batch", "world"), CASES)
def test_a_start_in_the_middle_continues_exactly(length, batch, world):
    for rank in range(world):
        options = {"rank": rank, "world": world}
        whole = given(length, batch, 3, seed=9, **options)
        for start in range(len(whole) + 1):
            sampler = Batches(length, batch, 3, seed=9, start=start, **options)
            assert len(sampler) == len(whole) - start
            assert list(sampler) == whole[start:]


def test_a_sampler_gives_the_same_batches_each_time():
    sampler = Batches(13, 4, 2, seed=0, start=3)
    assert list(sampler) == list(sampler)
    assert len(sampler) == len(list(sampler)) == sampler.steps - 3 == 5


def test_rows_are_plain_integers():
    for epoch, row in given(5, 2, 1, seed=0)[0]:
        assert type(epoch) is int and type(row) is int


def test_the_seed_decides_the_order():
    orders = {tuple(rows(given(40, 8, 1, seed=seed))) for seed in range(5)}
    assert len(orders) == 5


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError) as error:
        Batches(10, 6, 1, seed=0, world=4)
    assert str(error.value) == "a batch of 6 does not split over 4 processes"


def test_a_list_without_rows_is_refused():
    with pytest.raises(ValueError) as error:
        Batches(0, 6, 1, seed=0)
    assert str(error.value) == "a list without rows cannot be sampled"
