import numpy as np
import pytest

from kit.answers import duplicates
from kit.answers.duplicates import by_features, by_hash
from kit.data.perceptual import FLAT, HASHED, UNREADABLE, Hashes
from tests.answers.scenes import cosines, features, unit


def expected(ours, theirs, least):
    """Row -> (score, lowest row of the likest), and the number of pairs; each one by one."""
    scores = cosines(ours.vectors, theirs.vectors).astype(np.float32)
    readable = ours.readable()
    near, count = {}, 0
    for i in range(len(ours)):
        for j in range(len(theirs)):
            if readable[i] and scores[i, j] >= np.float32(least):
                count += 1
                if i not in near or scores[i, j] > near[i][0]:
                    near[i] = scores[i, j], j
    return near, count


def check(ours, theirs, least):
    found = by_features(ours, theirs, least)
    near, count = expected(ours, theirs, least)
    assert found.pairs == count
    assert found.ids.tolist() == [str(ours.ids[i]) for i in sorted(near)]
    assert found.of.tolist() == [str(theirs.ids[near[i][1]]) for i in sorted(near)]
    assert found.certainty.tolist() == [near[i][0] for i in sorted(near)]
    return near


@pytest.fixture
def lists():
    """Features of two lists, some of them copies, nearly copies, equal and unreadable."""
    vectors, others = unit(300, 16, 1), unit(90, 16, 2)
    others[:30] = vectors[40:70]
    others[30:40] = vectors[40:50]  # the same once more: the first counts
    noisy = others[5] + np.random.default_rng(0).normal(0, 0.02, (80, 16))
    vectors[200:280] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    ours = features(vectors, "train", unreadable=(41, 250))
    return ours, features(others, "index", unreadable=(7, 33))


@pytest.mark.parametrize("least", [0.3, 0.7, 0.95, 0.999])
def test_near_images_are_those_of_all_pairs(lists, least):
    near = check(*lists, least)
    assert len(near) > 20


@pytest.mark.parametrize("few", [1, 3, 64])
@pytest.mark.parametrize("scored", [(2, 7), (64, 16_384)])
def test_near_images_do_not_depend_on_the_sizes_of_blocks(
    lists, few, scored, monkeypatch
):
    monkeypatch.setattr(duplicates, "FEW", few)
    monkeypatch.setattr(duplicates, "SCORED", scored)
    monkeypatch.setattr(duplicates, "QUERIES", 11)
    check(*lists, 0.9)


def test_equal_images_are_all_found_and_the_first_is_named():
    same = np.repeat(unit(1), 500, axis=0)
    ours, theirs = features(same, "train"), features(same[:200], "index")
    found = by_features(ours, theirs, 0.9)
    assert found.pairs == 500 * 200
    assert found.ids.tolist() == ours.ids.tolist()
    assert set(found.of.tolist()) == {"i0000"}


def test_nothing_near_is_nothing_found(lists):
    found = by_features(features(unit(20, 16, 5), "train"), lists[1], 0.99)
    assert found.pairs == len(found.ids) == len(found.of) == len(found.certainty) == 0


def test_a_list_shorter_than_what_is_looked_for(lists):
    short = features(np.array(lists[0].vectors[38:45]), "train")
    check(short, lists[1], 0.9)


def test_stores_that_are_read_only_are_enough(lists):
    for each in lists:
        each.vectors.setflags(write=False)
    check(*lists, 0.9)


def hashes(values, states, name):
    ids = np.char.mod(f"{name}%04d", np.arange(len(values))).astype("U16")
    return Hashes(ids, np.array(values, np.uint64), np.array(states, np.uint8), {})


def test_by_hash_only_pictures_with_a_hash_are_compared():
    ours = hashes(
        [7, 0, 0, 1 << 50, 7], [HASHED, FLAT, HASHED, HASHED, UNREADABLE], "t"
    )
    theirs = hashes([0, 7, 3, 7], [FLAT, UNREADABLE, HASHED, HASHED], "i")
    found = by_hash(ours, theirs, 1)
    assert found.ids.tolist() == ["t0000"]
    assert found.of.tolist() == ["i0003"]
    assert found.certainty.tolist() == [0]
    assert found.pairs == 2
    found = by_hash(ours, theirs, 3)
    assert found.ids.tolist() == ["t0000", "t0002", "t0003"]
    assert found.of.tolist() == ["i0003", "i0002", "i0002"]
    assert found.certainty.tolist() == [0, -2, -3]
