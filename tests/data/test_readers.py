import gc
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from kit.data import tars
from kit.data.augment import Augment
from kit.data.images import EvalImages, TrainImages, in_worker
from kit.data.inputs import InputSpec, View
from kit.data.readers import Folder, Tars, UnreadableImage, open_reader


def write(path, number):
    """A small picture of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC)
    image.save(path, "JPEG")


def pack(source, path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            archive.add(source / name, name)


@pytest.fixture
def both(tmp_path):
    """The same 24 images as a folder and as four tars in the official layout; their paths."""
    folder, packed = tmp_path / "files", tmp_path / "tars"
    paths = []
    for split in ("train", "index"):
        for part in range(2):
            names = []
            for n in range(6):
                letter = "abcdef"[n]
                name = f"{letter}/{part}/{n}/{letter}{part}{n}{'0' * 13}.jpg"
                write(folder / split / name, len(paths))
                names.append(name)
                paths.append(f"{split}/{name}")
            pack(folder / split, packed / split / f"images_{part:03d}.tar", names)
    tars.index(packed)
    return folder, packed, paths


def message(reader, path):
    with pytest.raises(UnreadableImage) as error:
        reader.read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tars_give_the_same_bytes_as_the_folder(both):
    folder, packed, paths = both
    files, members = open_reader(folder), open_reader(packed)
    assert isinstance(files, Folder) and isinstance(members, Tars)
    assert (files.root, members.root) == (folder, packed)
    for path in np.random.default_rng(0).permutation(paths):
        assert files.read(path) == members.read(path) == (folder / path).read_bytes()
        assert files.exists(path) and members.exists(path)
    for reader in (files, members):
        assert not reader.exists("train/none.jpg") and not reader.exists("train")


def test_an_image_that_no_tar_has_is_unreadable_by_name(both):
    _, packed, paths = both
    reader = open_reader(packed)
    said = message(reader, "train/0/0/0/none.jpg")
    path = packed / "train/0/0/0/none.jpg"
    assert said == f"{path}: in none of 4 tars, and no such file"
    assert reader.read(paths[0])


def test_a_file_counts_only_where_no_tar_has_its_path(both):
    folder, packed, paths = both
    write(packed / paths[3], 99)
    write(packed / "test/new.jpg", 98)
    reader = open_reader(packed)
    assert reader.read(paths[3]) == (folder / paths[3]).read_bytes()
    assert reader.read("test/new.jpg") == (packed / "test/new.jpg").read_bytes()
    assert reader.exists("test/new.jpg")


def test_a_missing_file_is_unreadable_by_name(both):
    folder, _, _ = both
    reader = Folder(folder)
    said = message(reader, "train/none.jpg")
    assert said == f"{folder / 'train/none.jpg'}: No such file or directory"
    assert message(reader, "train") == f"{folder / 'train'}: Is a directory"


def test_a_missing_file_beside_tars_without_an_index_says_what_to_do(both):
    _, packed, paths = both
    (packed / "tar_index/tars.json").unlink()
    reader = open_reader(packed)
    assert isinstance(reader, Folder)
    assert message(reader, paths[0]) == (
        f"{packed / paths[0]}: No such file or directory (4 tars are there without an "
        f"index: python -m kit.data.tars {packed})"
    )


def test_a_tar_that_changed_or_is_gone_ends_the_run(both):
    _, packed, paths = both
    path = packed / "train/images_000.tar"
    os.utime(path, ns=(0, 1))
    advice = f"run python -m kit.data.tars {packed}"
    with pytest.raises(ValueError) as error:
        open_reader(packed).read(paths[0])
    assert str(error.value) == f"{path}: changed since it was indexed; {advice}"
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="changed since it was indexed"):
        open_reader(packed).read(paths[0])
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        open_reader(packed).read(paths[0])
    said = f"{path}: gone since it was indexed; put it back or {advice}"
    assert str(error.value) == said
    assert open_reader(packed).read(paths[-1])  # of another tar
    tars.index(packed)
    assert "in none of 3 tars" in message(open_reader(packed), paths[0])


def test_a_tar_that_shrinks_while_it_is_open_is_unreadable(both):
    _, packed, paths = both
    reader = open_reader(packed)
    reader.read(paths[0])
    os.truncate(packed / "train/images_000.tar", 900)
    assert message(reader, paths[5]) == f"{paths[5]} in train/images_000.tar: cut short"


def open_tars():
    return sum(
        os.path.realpath(fd).endswith(".tar") for fd in Path("/proc/self/fd").iterdir()
    )


@pytest.mark.parametrize("kept", [512, 2, 0])
def test_descriptors_are_few_and_end_with_the_reader(both, kept, monkeypatch):
    _, packed, paths = both
    monkeypatch.setattr(Tars, "KEPT", kept)
    gc.collect()  # the last test's reader, which its exception still holds
    reader = open_reader(packed)
    assert open_tars() == 0  # none is opened before it is needed
    for _ in range(3):
        for path in paths:
            reader.read(path)
    assert open_tars() == min(kept, 4)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(reader.read, paths * 50))) == 1200
        assert open_tars() == min(kept, 4)
    del reader
    assert open_tars() == 0


def test_a_pickled_reader_is_small_and_opens_its_own_files(both):
    folder, packed, paths = both
    reader = open_reader(packed)
    reader.read(paths[0])
    data = pickle.dumps(reader)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy._descriptors == {}
    assert copy.read(paths[1]) == (folder / paths[1]).read_bytes()


def _checked(reader, folder, paths, failures):
    for path in paths * 20:
        if reader.read(path) != (folder / path).read_bytes():
            failures.put(path)


def test_forked_processes_share_a_reader(both):
    folder, packed, paths = both
    context = multiprocessing.get_context("fork")
    reader, failures = open_reader(packed), context.Queue()
    for path in paths[::5]:
        reader.read(path)  # some tars are open already
    workers = [
        context.Process(target=_checked, args=(reader, folder, mixed, failures))
        for mixed in (paths, paths[::-1])
    ]
    for worker in workers:
        worker.start()
    _checked(reader, folder, paths, failures)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert failures.empty()


def test_loader_workers_read_from_tars_what_they_read_from_files(both):
    folder, packed, paths = both
    spec, labels = InputSpec(size=32), np.arange(24)
    keys = [[(0, row) for row in range(start, start + 6)] for start in range(0, 24, 6)]
    batches = []
    for root in (folder, packed):
        data = TrainImages(root, np.array(paths), labels, spec, Augment(crop=0.5), 0)
        loader = DataLoader(
            data, batch_sampler=keys, num_workers=2, worker_init_fn=in_worker
        )
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
        assert (one[2] == -1).all()


def test_damage_inside_a_tar_is_one_unreadable_image(both):
    folder, packed, paths = both
    whole = (folder / paths[2]).read_bytes()
    place = tars.Index(packed).find(paths[2])
    with (packed / "train/images_000.tar").open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        file.write(bytes(place.size - place.size // 2))
    tars.index(packed)
    views = [View(InputSpec(32))]
    data = EvalImages(packed, np.array([*paths[:4], "train/none.jpg"]), views)
    assert len(Folder(folder).read(paths[2])) == len(whole)
    assert [data[row][1] for row in range(5)] == [True, True, False, True, False]
    train = TrainImages(
        packed, np.array(paths[:4]), np.arange(4), InputSpec(32), Augment(), 0
    )
    assert train[0, 2][1:] == (3, 2, True)
