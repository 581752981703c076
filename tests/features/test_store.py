import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kit import __version__, checksums, files
from kit.features import store
from kit.features.store import Features

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {
    "model": {"name": "clean", "hash": "a" * 64},
    "list": {"name": "index", "hash": "b" * 64},
    "seen": {"c" * 64: "clean"},
    "scales": [1.0],
}
# ids that look like numbers, out of order
IDS = np.array(
    ["123456789012e345", "0000000000012345", "ffffffffffffffff", "0059123412341234"]
    + [f"{number:016x}" for number in (11, 2, 7, 9, 5, 8)]
)


def vectors_of(count: int, dim: int = 3) -> np.ndarray:
    return 1 + np.arange(count * dim, dtype=np.float16).reshape(count, dim)


def filled(folder: Path, ids=IDS, vectors=None, block: int = 4, about=ABOUT) -> Path:
    """A complete store of `vectors`, written block by block."""
    values = vectors_of(len(ids)) if vectors is None else vectors
    store.create(folder, ids, values.shape[1], block, about)
    write(folder, values)
    store.finish(folder)
    return folder


def write(folder: Path, values: np.ndarray, *blocks: int) -> None:
    """Some blocks of `values`, or all of them."""
    writer = store.Writer(folder)
    size = writer.block
    for number in blocks or range(len(writer.done)):
        writer.write(number, values[number * size : (number + 1) * size])


def vectors_in(folder: Path) -> np.ndarray:
    return np.load(folder / "vectors.npy")


def marks_in(folder: Path) -> list[int]:
    return np.load(folder / "done.npy").tolist()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features" / "clean" / "index"


# Creating, filling, going on


def test_what_was_written_is_read(folder):
    features = store.load(filled(folder))
    assert features.ids.dtype == np.dtype("U16")
    assert features.ids.tolist() == IDS.tolist()
    assert isinstance(features.vectors, np.memmap)
    assert features.vectors.dtype == np.float16
    assert np.array_equal(features.vectors, vectors_of(10))
    assert (len(features), features.dim) == (10, 3)
    assert features.readable().all()


def test_a_store_is_files_that_can_be_read_without_us(folder):
    filled(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "done.npy",
        "ids.npy",
        "manifest.json",
        "vectors.npy",
    ]
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    assert arrays["ids"].dtype == np.dtype("U16")
    assert arrays["vectors"].shape == (10, 3) and arrays["vectors"].flags.c_contiguous
    assert arrays["done"].tolist() == [1, 1, 1]
    found = files.read_json(folder / "manifest.json")
    assert found.pop("checksums").keys() == {"done.npy", "ids.npy", "vectors.npy"}
    assert len(found.pop("seal")) == 64
    assert found == ABOUT | {
        "rows": 10,
        "dim": 3,
        "block": 4,
        "complete": True,
        "unreadable": [],
        "kit": __version__,
    }


@pytest.mark.parametrize(
    ("rows", "block", "blocks"), [(10, 4, 3), (8, 4, 2), (1, 4, 1), (9, 1, 9)]
)
def test_a_new_store_is_zeros_and_no_block_of_it_is_done(folder, rows, block, blocks):
    done = store.create(folder, IDS[:rows], 3, block, ABOUT)
    assert done.tolist() == marks_in(folder) == [0] * blocks
    vectors = vectors_in(folder)
    assert vectors.shape == (rows, 3) and not vectors.any()
    assert store.Writer(folder).done.tolist() == [0] * blocks


def test_a_store_of_the_same_facts_goes_on_where_it_stopped(folder):
    store.create(folder, IDS, 3, 4, ABOUT)
    write(folder, vectors_of(10), 1)
    assert store.create(folder, IDS, 3, 4, ABOUT).tolist() == [0, 1, 0]
    assert store.Writer(folder).done.tolist() == [0, 1, 0]
    assert np.array_equal(vectors_in(folder)[4:8], vectors_of(10)[4:8])


def test_a_finished_store_of_the_same_facts_stays_finished(folder):
    filled(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert store.create(folder, IDS, 3, 4, ABOUT).tolist() == [1, 1, 1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(store.load(folder)) == 10


@pytest.mark.parametrize(
    "changed",
    [
        {"about": ABOUT | {"model": {"name": "clean", "hash": "0" * 64}}},
        {"about": ABOUT | {"list": {"name": "index", "hash": "0" * 64}}},
        {"about": ABOUT | {"scales": [1.0, 0.7]}},
        {"ids": IDS[:9]},
        {"dim": 4},
        {"block": 5},
    ],
    ids=["model", "list", "scales", "rows", "dim", "block"],
)
def test_a_store_of_other_facts_is_replaced(folder, changed):
    filled(folder)
    how = {"ids": IDS, "dim": 3, "block": 4, "about": ABOUT} | changed
    done = store.create(folder, **how)
    assert not done.any()
    vectors = vectors_in(folder)
    assert vectors.shape == (len(how["ids"]), how["dim"]) and not vectors.any()
    assert np.load(folder / "ids.npy").tolist() == how["ids"].tolist()
    with pytest.raises(ValueError, match="has not finished"):
        store.load(folder)


def test_a_store_that_was_killed_while_it_was_prepared_is_begun_again(folder):
    filled(folder)
    (folder / "manifest.json").unlink()  # it is written last
    assert store.create(folder, IDS, 3, 4, ABOUT).tolist() == [0, 0, 0]
    assert not vectors_in(folder).any()


def test_the_disk_s_blocks_are_taken_before_anything_is_written(folder):
    store.create(folder, IDS.repeat(300), 512, 512, ABOUT)
    stat = (folder / "vectors.npy").stat()
    size = 3000 * 512 * 2
    assert size < stat.st_size <= size + 256
    assert stat.st_blocks * 512 >= stat.st_size
    assert np.load(folder / "vectors.npy", mmap_mode="r").shape == (3000, 512)


def test_a_disk_that_is_full_is_one_clear_line_and_leaves_no_store(folder):
    filled(folder)  # an older store of other facts
    code = f"""
import resource, sys
from pathlib import Path
import numpy as np
from kit.features import store

folder = Path({str(folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.create(folder, np.arange(1000).astype("U16"), 512, 512, {{}})
except OSError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    line = r"(\S+): not written: File too large \(1.0 MB wanted, \S+ MB free\); .*\n"
    said = re.fullmatch(line, done.stderr)
    assert said and said[1] == str(folder / "vectors.npy"), done.stderr
    assert list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no features in"):
        store.load(folder)


def refuse(number: int):
    def call(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    return call


def emulate(file: int, offset: int, length: int) -> None:
    """As the C library does where the disk has no such call: it reads and writes in each block."""
    for at in range(offset, offset + length, 4096):
        os.pread(file, 1, at)
    os.truncate(file, length)


FALLOCATE = {
    "none": None,  # macOS
    "emulated": emulate,
    "EOPNOTSUPP": refuse(errno.EOPNOTSUPP),
    "EINVAL": refuse(errno.EINVAL),
    "ENOSYS": refuse(errno.ENOSYS),
}


@pytest.mark.parametrize("shape", [(40, 512), (41, 512), (3, 2048), (7, 3), (0, 4)])
@pytest.mark.parametrize("kind", FALLOCATE)
def test_space_is_taken_on_a_disk_without_fallocate(folder, monkeypatch, kind, shape):
    if FALLOCATE[kind] is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", FALLOCATE[kind])
    monkeypatch.setattr(store, "CHUNK", 1000)
    store.allocate(folder / "a.npy", shape, np.float16)
    there = np.load(folder / "a.npy", allow_pickle=False)
    assert there.dtype == np.float16 and np.array_equal(there, np.zeros(shape))
    if kind != "emulated":  # a hole would be a crash where the disk is full later
        assert os.stat(folder / "a.npy").st_blocks * 512 >= there.nbytes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_without_room_is_an_error_and_no_file(folder, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    with pytest.raises(OSError, match=r"not written: .*\(2.0 MB wanted, ") as caught:
        store.allocate(folder / "a.npy", (1000, 1000), np.float16)
    assert caught.value.errno == number and not list(folder.iterdir())


def test_rows_are_overwritten_in_every_type_and_no_other_bytes_are(tmp_path):
    for dtype in (np.uint8, np.int32, np.float16, np.float64):
        before = np.arange(40).reshape(10, 4).astype(dtype)
        np.save(tmp_path / "a.npy", before)
        store.write_rows(tmp_path / "a.npy", 3, -np.ones((2, 4), np.int64) % 7)
        before[3:5] = -1 % 7
        assert np.array_equal(np.load(tmp_path / "a.npy"), before)


def test_a_disk_that_fills_up_later_is_found_out_before_the_manifest(
    folder, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        store.create(folder, IDS, 3, 4, ABOUT)
    monkeypatch.undo()
    assert not (folder / "manifest.json").exists()
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    assert store.create(folder, IDS, 3, 4, ABOUT).tolist() == [0, 0, 0]


# Writing


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_block_is_its_own_bytes_and_no_other(folder, number):
    store.create(folder, IDS, 3, 4, ABOUT)
    before = vectors_in(folder)
    write(folder, vectors_of(10), number)
    rows = slice(number * 4, number * 4 + 4)
    assert np.array_equal(vectors_in(folder)[rows], vectors_of(10)[rows])
    left = np.delete(vectors_in(folder), range(*rows.indices(10)), axis=0)
    assert np.array_equal(left, np.delete(before, range(*rows.indices(10)), axis=0))
    assert marks_in(folder) == [int(n == number) for n in range(3)]
    write(folder, 2 * vectors_of(10), number)  # again
    assert np.array_equal(vectors_in(folder)[rows], 2 * vectors_of(10)[rows])


def test_several_writers_fill_a_store_together(folder):
    store.create(folder, IDS, 3, 1, ABOUT)
    writers = [store.Writer(folder) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for number in range(10):
            row = vectors_of(10)[number : number + 1]
            pool.submit(writers[number % 3].write, number, row)
    store.finish(folder)
    assert np.array_equal(store.load(folder).vectors, vectors_of(10))
    assert [int(writer.done.sum()) for writer in writers] == [4, 3, 3]


def test_a_block_is_marked_after_its_vectors_and_not_without(folder, monkeypatch):
    store.create(folder, IDS, 3, 4, ABOUT)
    synced = []
    real = os.fsync

    def fsync(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        synced.append((path.name, marks_in(folder)))
        if len(synced) == 3:
            raise OSError(5, "Input/output error")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write(folder, vectors_of(10), 0)
    with pytest.raises(OSError, match="Input/output"):
        write(folder, vectors_of(10), 1)
    assert synced == [
        ("vectors.npy", [0, 0, 0]),
        ("done.npy", [1, 0, 0]),
        ("vectors.npy", [1, 0, 0]),
    ]
    assert marks_in(folder) == [1, 0, 0]


@pytest.mark.parametrize(
    ("number", "shape"), [(0, (3, 3)), (0, (4, 2)), (2, (4, 3)), (3, (1, 3))]
)
def test_what_is_no_whole_block_is_refused(folder, number, shape):
    store.create(folder, IDS, 3, 4, ABOUT)
    with pytest.raises(ValueError, match=f"block {number} is .*, not "):
        store.Writer(folder).write(number, np.ones(shape))
    assert not vectors_in(folder).any() and marks_in(folder) == [0, 0, 0]


# Finishing


def test_a_store_with_a_missing_block_is_not_finished_and_not_loaded(folder):
    store.create(folder, IDS, 3, 4, ABOUT)
    write(folder, vectors_of(10), 0, 1)
    with pytest.raises(RuntimeError, match="blocks are missing; run 03_extract"):
        store.finish(folder)
    with pytest.raises(ValueError, match="extraction has not finished; run 03_extract"):
        store.load(folder)
    write(folder, vectors_of(10), 2)
    store.finish(folder)
    assert len(store.load(folder)) == 10


def test_rows_of_zeros_are_those_that_could_not_be_read(folder):
    vectors = vectors_of(10)
    vectors[[1, 9]] = 0
    vectors[3, :2] = 0  # one number is enough
    features = store.load(filled(folder, vectors=vectors))
    assert features.manifest["unreadable"] == [IDS[1], IDS[9]]
    expected = [row not in (1, 9) for row in range(10)]
    assert features.readable().tolist() == expected


def test_unreadable_rows_are_found_in_stores_of_any_length(folder):
    count = 2 * 65_536 + 3
    ids = np.char.mod("%d", np.arange(count))
    vectors = np.ones((count, 1), np.float16)
    zero = [0, 65_535, 65_536, 131_071, 131_072, count - 1]
    vectors[zero] = 0
    features = store.load(filled(folder, ids, vectors, block=65_536))
    assert features.manifest["unreadable"] == [str(row) for row in zero]
    assert np.flatnonzero(~features.readable()).tolist() == zero


def test_a_block_can_be_written_without_its_mark(folder):
    store.create(folder, IDS, 3, 4, ABOUT)
    writer = store.Writer(folder)
    writer.write(1, vectors_of(10)[4:8], mark=False)
    assert np.array_equal(vectors_in(folder)[4:8], vectors_of(10)[4:8])
    assert marks_in(folder) == writer.done.tolist() == [0, 0, 0]


def test_a_store_that_lacks_blocks_is_finished_with_what_is_there(folder):
    store.create(folder, IDS, 3, 4, ABOUT)
    write(folder, vectors_of(10), 0)
    store.Writer(folder).write(1, vectors_of(10)[4:8] * [[0], [1], [0], [0]], False)
    assert store.finish(folder, lacking=True) == 5
    features = store.load(folder)
    assert features.manifest["unreadable"] == IDS[[4, 6, 7, 8, 9]].tolist()
    assert marks_in(folder) == [1, 0, 0]
    assert store.create(folder, IDS, 3, 4, ABOUT).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="has not finished"):
        store.load(folder)  # it goes on
    write(folder, vectors_of(10), 1, 2)
    assert store.finish(folder) == 0
    assert np.array_equal(store.load(folder).vectors, vectors_of(10))


def test_a_store_that_lacks_everything_is_not_finished(folder):
    store.create(folder, IDS, 3, 4, ABOUT)
    with pytest.raises(RuntimeError, match="not one image's features are there"):
        store.finish(folder, lacking=True)
    with pytest.raises(ValueError, match="has not finished"):
        store.load(folder)


# Reading


def test_missing_features_say_how_to_make_them(folder):
    with pytest.raises(FileNotFoundError, match="no features in .*03_extract_features"):
        store.load(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("vectors.npy", np.ones((10, 4), np.float16)),
        ("vectors.npy", np.ones((9, 3), np.float16)),
        ("ids.npy", IDS[:9]),
    ],
)
def test_files_that_the_manifest_does_not_describe_are_refused(folder, name, array):
    np.save(filled(folder) / name, array)
    with pytest.raises(checksums.Damaged, match=f"{name}: .*03_extract_features"):
        store.load(folder)
    again = filled(folder)  # which finds it and makes it anew
    assert np.array_equal(store.load(again).vectors, vectors_of(10))


@pytest.mark.parametrize("row", [0, 4, 9])
def test_rows_that_the_disk_lost_are_not_taken_for_unreadable_images(folder, row):
    store.create(folder, IDS, 3, 4, ABOUT)
    write(folder, vectors_of(10))
    kept = np.load(folder / "vectors.npy", mmap_mode="r+")
    kept[row] = 0
    kept.flush()
    with pytest.raises(ValueError, match=f"vectors.npy: block {row // 4} has zero"):
        store.finish(folder)
    filled(folder)
    assert store.load(folder).readable().all()


@pytest.mark.parametrize("name", ["complete", "unreadable", "rows", "dim"])
def test_a_manifest_without_a_field_or_a_seal_is_refused_by_name(folder, name):
    path = filled(folder) / "manifest.json"
    about = files.read_json(path)
    without = {key: about[key] for key in about if key != name}
    files.write_json(path, without)
    with pytest.raises(checksums.Damaged, match="manifest.json: damaged"):
        store.load(folder)
    checksums.write_manifest(path, without)
    with pytest.raises(checksums.Damaged, match=f"manifest.json: has no '{name}'"):
        store.load(folder)
    about.pop("checksums")
    checksums.write_manifest(path, about)
    with pytest.raises(checksums.Damaged, match="no checksums; .*03_extract_features"):
        store.load(folder)


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy"])
def test_a_file_cut_short_is_refused(folder, name):
    path = filled(folder) / name
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(ValueError):
        store.load(folder)


def test_pickled_arrays_are_not_loaded(folder):
    np.save(filled(folder) / "ids.npy", IDS.astype(object), allow_pickle=True)
    about = checksums.read_manifest(folder / "manifest.json", "")
    about["checksums"] = checksums.compute_checksums(folder, store.FILES)
    checksums.write_manifest(folder / "manifest.json", about)  # made by an attacker
    with pytest.raises(ValueError, match="allow_pickle|Python objects"):
        store.load(folder)


def test_features_of_another_list_or_model_are_refused(folder):
    features = store.load(filled(folder))
    assert store.expect(features) is features
    same = store.expect(features, list_hash="b" * 64, model_hash="a" * 64)
    assert same is features
    expected = "^features of list index: hash bbbbbbbbbbbb is not the expected 0000000"
    with pytest.raises(ValueError, match=expected):
        store.expect(features, list_hash="0" * 64, model_hash="a" * 64)
    expected = "^features of model clean: hash aaaaaaaaaaaa is not the expected 000000"
    with pytest.raises(ValueError, match=expected):
        store.expect(features, list_hash="b" * 64, model_hash="0" * 64)


@pytest.fixture
def features():
    return Features(IDS, vectors_of(10), ABOUT | {"unreadable": []})


def test_find_gives_the_rows_of_ids_in_their_order(features):
    wanted = IDS[[9, 0, 3, 3, 7]]
    assert features.find(wanted).tolist() == [9, 0, 3, 3, 7]
    assert features.find(IDS).tolist() == list(range(10))
    assert features.find(IDS[:0]).tolist() == []


@pytest.mark.parametrize("start", [0, 1, 4, 7, 9, 10, 30])
def test_where_ids_are_looked_for_first_changes_nothing(features, start):
    for wanted in (IDS[4:7], IDS[6:3:-1], IDS[:0], IDS[9:]):
        expected = [IDS.tolist().index(each) for each in wanted]
        assert features.find(wanted, start).tolist() == expected


def test_locate_marks_the_ids_that_are_not_there(features):
    wanted = np.array([IDS[9], "0" * 16, IDS[0], IDS[0], "g" * 16, ""])
    assert features.locate(wanted).tolist() == [9, -1, 0, 0, -1, -1]
    assert features.locate(IDS[:0]).tolist() == []


@pytest.mark.parametrize(
    "strange",
    ["0000000000000000", "gggggggggggggggg", "12345", "00000000000123450", "0" * 15],
)
def test_find_refuses_an_id_that_is_not_there_and_counts(features, strange):
    wanted = np.array([IDS[4], strange, IDS[0], "8" * 16])
    message = f"^features of list index have no image {strange} \\(2 missing\\)$"
    with pytest.raises(ValueError, match=message):
        features.find(wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 11, 1000])
def test_blocks_cover_the_rows_in_order_whatever_their_size(features, size):
    blocks = list(features.blocks(size=size))
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= size
    assert all(block.dtype == torch.float32 for block in blocks)
    assert torch.equal(torch.cat(blocks), torch.from_numpy(vectors_of(10)).float())

    rows = np.array([7, 0, 0, 9, 3])
    blocks = list(features.blocks(rows, size))
    assert all(0 < len(block) <= size for block in blocks)
    assert torch.equal(
        torch.cat(blocks), torch.from_numpy(vectors_of(10)[rows]).float()
    )


def test_blocks_are_copies(folder):
    features = store.load(filled(folder))
    for block in features.blocks(size=4):
        block.zero_()
    assert np.array_equal(store.load(folder).vectors, vectors_of(10))
