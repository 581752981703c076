import os

import numpy as np
import pytest
import torch

from kit import checksums
from kit.features import screen, store
from kit.features.search import knn


def vectors(rows=700, dim=32, seed=0):
    random = np.random.default_rng(seed)
    found = random.standard_normal((rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def made(folder, values):
    """A complete store of these rows."""
    ids = np.array([f"{number:016x}" for number in range(len(values))])
    about = {"model": {"name": "m"}, "list": {"name": "l"}, "seen": {}}
    store.create(folder, ids, values.shape[1], 256, about)
    kept = np.load(folder / "vectors.npy", mmap_mode="r+")
    kept[:] = values
    kept.flush()
    blocks = -(-len(values) // 256)
    np.save(folder / "done.npy", np.full(blocks, store.WITH_ZEROS, np.uint8))
    store.finish(folder)
    return store.load(folder)


def test_the_copy_is_the_store_rounded_to_bfloat16(tmp_path):
    features = made(tmp_path, vectors())
    path = screen.build(tmp_path)
    copy = np.load(path)
    assert copy.dtype == np.uint16 and copy.shape == (700, 32)
    expected = torch.from_numpy(vectors()).bfloat16()
    assert torch.equal(screen.of(features).rows, expected)
    assert torch.equal(
        torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16), expected
    )


def test_the_bounds_hold_for_every_row_and_are_not_wide(tmp_path):
    features = made(tmp_path, vectors())
    screen.build(tmp_path)
    exact = torch.from_numpy(vectors()).double()
    rounded = exact.bfloat16().double()
    bounds = screen.of(features).bounds
    off = (exact - rounded).norm(dim=1).max()
    longest = rounded.norm(dim=1).max()
    assert off <= bounds.off <= 1.01 * off
    assert longest <= bounds.longest <= 1.01 * longest


@pytest.mark.parametrize("row", [0, 300, 699])
def test_the_bounds_are_those_of_the_worst_row_wherever_it_stands(tmp_path, row):
    values = vectors()
    values[row] = 0
    values[row, :16] = (1 + 2.0**-8) / 4  # long, and half a unit from bfloat16's next
    features = made(tmp_path, values)
    screen.build(tmp_path)
    exact = torch.from_numpy(values).double()
    off = (exact - exact.bfloat16().double()).norm(dim=1)
    assert off.argmax() == row == exact.norm(dim=1).argmax()
    bounds = screen.of(features).bounds
    assert off[row] <= bounds.off <= 1.01 * off[row]
    assert exact[row].norm() + off[row] <= bounds.longest <= 1.01 * exact[row].norm()


@pytest.mark.parametrize("k", [1, 7])
def test_the_search_finds_the_same_with_and_without_a_copy(tmp_path, k):
    features, query = made(tmp_path, vectors(3000)), vectors(9, seed=1)
    expected = knn(query, features, k, screening="bf16")
    screen.build(tmp_path)
    for options in ({}, {"rows": np.arange(3000)}, {"devices": ["cpu"] * 2}):
        found = knn(query, features, k, screening="bf16", **options)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.scores, expected.scores)
    several = knn([query] * 2, [features] * 2, k, screening="bf16")
    assert torch.equal(several.rows, expected.rows)


def test_a_copy_that_is_there_is_not_made_again(tmp_path):
    made(tmp_path, vectors())
    path = screen.build(tmp_path)
    before = path.stat().st_mtime_ns
    assert screen.build(tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_a_copy_of_other_vectors_is_ignored_until_it_is_built_again(tmp_path, caplog):
    made(tmp_path, vectors())
    screen.build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    features = made(tmp_path, vectors(seed=5))
    assert screen.of(features) is None
    assert "a copy of other vectors, not used; build it again" in caplog.text
    screen.build(tmp_path)
    expected = torch.from_numpy(vectors(seed=5)).bfloat16()
    assert torch.equal(screen.of(features).rows, expected)


def test_a_copy_that_was_moved_with_its_store_is_known_by_the_hash(tmp_path):
    features = made(tmp_path, vectors())
    screen.build(tmp_path)
    os.utime(tmp_path / "vectors.npy", ns=(1, 1))
    assert screen.of(features) is not None


@pytest.mark.parametrize("name", ["screen.npy", "screen.json"])
def test_a_damaged_copy_is_refused_by_name_until_it_is_built_again(tmp_path, name):
    features = made(tmp_path, vectors())
    screen.build(tmp_path)
    flip(tmp_path / name)
    with pytest.raises(checksums.Damaged, match=f"{name}: .*kit.features.screen"):
        screen.of(features)
    screen.build(tmp_path)
    expected = torch.from_numpy(vectors()).bfloat16()
    assert torch.equal(screen.of(features).rows, expected)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_copy_that_was_not_finished_is_no_copy(tmp_path):
    features = made(tmp_path, vectors())
    screen.build(tmp_path)
    (tmp_path / "screen.json").unlink()
    assert screen.of(features) is None
    screen.build(tmp_path)
    assert screen.of(features) is not None


def test_a_copy_is_only_that_of_the_whole_store(tmp_path):
    features = made(tmp_path, vectors())
    assert screen.of(features) is None
    screen.build(tmp_path)
    for rows in (slice(0, 100), slice(None, None, -1)):
        for about in ({}, features.manifest):
            part = store.Features(features.ids[rows], features.vectors[rows], about)
            assert screen.of(part) is None
    held = store.Features(features.ids, np.array(features.vectors), {})
    assert screen.of(held) is None


def test_unreadable_rows_have_a_copy_of_zeros(tmp_path):
    values = vectors()
    values[3] = 0
    features = made(tmp_path, values)
    screen.build(tmp_path)
    assert not screen.of(features).rows[3].any()


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "length 2.828"), (np.inf, "finite")]
)
def test_rows_that_break_the_proof_are_named(tmp_path, value, words):
    values = vectors()
    values[599] = value
    made(tmp_path, values)
    with pytest.raises(ValueError, match=f"^row 599 of the features has .*{words}"):
        screen.build(tmp_path)
    assert {path.name for path in tmp_path.glob("*screen*")} == set()


def test_the_command_writes_copies_and_names_what_is_no_store(tmp_path, capsys):
    for name in "ab":
        made(tmp_path / name, vectors(seed=ord(name)))
    screen.main([str(tmp_path / name) for name in "ab"])
    told = capsys.readouterr().out.split()
    assert told == [str(tmp_path / name / "screen.npy") for name in "ab"]
    assert screen.of(store.load(tmp_path / "a")) is not None
    with pytest.raises(SystemExit, match=f"no features in {tmp_path / 'c'}"):
        screen.main([str(tmp_path / "c")])
