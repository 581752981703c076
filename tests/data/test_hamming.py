from itertools import pairwise

import numpy as np
import pytest

from kit.data import hamming


def brute(first, second, most):
    """Every pair, one after the other."""
    return {
        (i, j): (int(a) ^ int(b)).bit_count()
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if (int(a) ^ int(b)).bit_count() <= most
    }


def listed(blocks):
    """The same from blocks of pairs; fails on a pair that comes twice."""
    found = {}
    for pairs in blocks:
        assert len(pairs.first) == len(pairs.second) == len(pairs.bits)
        for i, j, bits in zip(*(each.tolist() for each in pairs), strict=True):
            assert (i, j) not in found
            found[i, j] = bits
    return found


def near(values, rng, most):
    """Hashes that differ from some of `values` in 0 to `most` random bits."""
    out = rng.choice(values, 150)
    for n in range(len(out)):
        for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
            out[n] ^= np.uint64(1 << int(bit))
    return out


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def values(rng):
    return rng.integers(0, 1 << 64, 200, dtype=np.uint64)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 6, 7, 12, 20])
def test_all_pairs_are_found_once_as_by_comparing_each(values, rng, most):
    other = near(values, rng, most + 2)
    expected = brute(values, other, most)
    assert len(expected) > 40
    assert listed(hamming.within(values, other, most)) == expected
    swapped = {(j, i): bits for (i, j), bits in expected.items()}
    assert listed(hamming.within(other, values, most)) == swapped


@pytest.mark.parametrize("count", [3, 4, 5, 7, 9])
def test_any_plan_finds_the_same_pairs(values, rng, count, monkeypatch):
    def plan(most, keys, table):
        edges = [64 * n // count for n in range(count + 1)]
        radius, larger = divmod(most + 1, count)
        return [
            hamming.Chunk(low, high - low, radius - (n >= larger))
            for n, (low, high) in enumerate(pairwise(edges))
        ]

    monkeypatch.setattr(hamming, "plan", plan)
    other = near(values, rng, 8)
    assert listed(hamming.within(other, values, 6)) == brute(other, values, 6)


@pytest.mark.parametrize("most", range(64))
@pytest.mark.parametrize("sizes", [(10, 10), (1_000, 100_000), (900_000, 4_100_000)])
def test_a_pair_beyond_every_radius_differs_in_too_many_bits(most, sizes):
    chunks = hamming.plan(most, *sizes)
    assert sum(chunk.width for chunk in chunks) == 64
    assert [chunk.shift for chunk in chunks[1:]] == [
        chunk.shift + chunk.width for chunk in chunks[:-1]
    ]
    assert max(chunk.width for chunk in chunks) <= hamming.WIDEST
    assert sum(chunk.radius + 1 for chunk in chunks) == most + 1


def test_hashes_that_meet_in_one_key_are_found_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(hamming, "CANDIDATES", 64)
    monkeypatch.setattr(hamming, "KEYS", 16)
    low = rng.integers(0, 8, 120, dtype=np.uint64)  # all other bits are equal
    high = rng.integers(0, 8, 90, dtype=np.uint64) << np.uint64(61)
    assert listed(hamming.within(low, high, 3)) == brute(low, high, 3)


def test_candidates_are_bounded_but_for_those_of_one_key(rng, monkeypatch):
    monkeypatch.setattr(hamming, "CANDIDATES", 50)
    count = rng.integers(0, 30, 40)
    count[7] = 200
    begin = rng.integers(0, 1000, 40)
    expected = [(n, begin[n] + i) for n in range(40) for i in range(count[n])]
    found = list(hamming._candidates(begin, count))
    pairs = [pair for block in found for pair in zip(*block, strict=True)]
    assert pairs == expected
    assert all(len(n) <= 50 or set(n) == {7} for n, _ in found)
    sizes = [len(n) for n, _ in found]
    assert all(one + other > 50 for one, other in pairwise(sizes))


def test_no_hashes_have_no_pairs(values):
    none = np.zeros(0, np.uint64)
    assert not list(hamming.within(none, values, 6))
    assert not list(hamming.within(values, none, 6))
    found = hamming.nearest(none, values, 6)
    assert len(found.rows) == len(found.of) == len(found.bits) == found.pairs == 0
    assert not len(hamming.nearest(values, none, 6).rows)


def test_the_nearest_is_the_one_of_fewest_bits_and_lowest_row():
    first = np.array([0b1111, 1 << 60, 0, 0b1111], np.uint64)
    second = np.array([0b11, 0b111, 0b0, 0b1110, 0b111], np.uint64)
    found = hamming.nearest(first, second, 2)
    assert found.rows.tolist() == [0, 1, 2, 3]
    assert found.of.tolist() == [1, 2, 2, 1]  # rows 1, 3 and 4 are as near
    assert found.bits.tolist() == [1, 1, 0, 1]
    # 0b1111 with four of five, twice; 1 << 60 with 0; 0 with 0b11 and 0
    assert found.pairs == 2 * 4 + 1 + 2


@pytest.mark.parametrize("most", [0, 3, 6])
def test_the_nearest_and_the_count_are_those_of_all_pairs(values, rng, most):
    other = near(values, rng, 8)
    values[:40] = values[40]  # equal ones on both sides
    other[20:70] = values[40]
    expected = brute(values, other, most)
    best = {}
    for (i, j), bits in expected.items():
        best[i] = min(best.get(i, (99, 0)), (bits, j))
    found = hamming.nearest(values, other, most)
    assert found.pairs == len(expected) > 40 * 50
    assert found.rows.tolist() == sorted(best)
    assert list(zip(found.bits.tolist(), found.of.tolist(), strict=True)) == [
        best[i] for i in sorted(best)
    ]


def test_equal_hashes_cost_no_more_than_one(monkeypatch):
    seen = []
    within = hamming.within
    monkeypatch.setattr(
        hamming, "within", lambda *given: seen.append(given) or within(*given)
    )
    first, second = np.zeros(100_000, np.uint64), np.ones(80_000, np.uint64)
    found = hamming.nearest(first, second, 6)
    assert found.pairs == 100_000 * 80_000
    assert len(found.rows) == 100_000
    assert set(found.of.tolist()) == {0}
    assert [len(each) for each in seen[0][:2]] == [1, 1]


def test_the_hashes_given_stay_as_they_are(values, rng):
    other = near(values, rng, 4)
    before = values.copy(), other.copy()
    hamming.nearest(values, other, 6)
    assert (values == before[0]).all()
    assert (other == before[1]).all()


@pytest.mark.parametrize("most", [-1, 64])
def test_a_number_of_bits_that_no_hash_has_is_refused(values, most):
    with pytest.raises(ValueError, match=f"{most} bits .* 0 to 63"):
        list(hamming.within(values, values, most))


def test_other_numbers_than_hashes_are_refused(values):
    with pytest.raises(TypeError, match=r"second: int64 \(200,\), not"):
        list(hamming.within(values, values.astype(np.int64), 6))
