"""The cache of local features: whole or going on, of one describer, read without copies of it all."""

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kit import checksums
from kit.data.readers import UnreadableImage
from kit.rerank.local import cache, features, verification
from kit.rerank.local.features import LocalFeatures

NAMES = [f"image {number}" for number in range(11)]


@dataclass(frozen=True)
class Marks:
    """Keypoints that say which picture they are of; `counted` tells how many were described."""

    name: ClassVar[str] = "marks"
    dim: ClassVar[int] = 4
    counted: ClassVar[list] = []
    side: int = 100
    most: int = 9

    def __call__(self, image: np.ndarray) -> LocalFeatures:
        number = int(image[0, 0, 0])
        self.counted.append(number)
        keypoints = np.full((number % 4, 2), number + 0.25, np.float32)
        descriptors = np.full((number % 4, 4), number / 2, np.float16)
        return LocalFeatures(keypoints, descriptors, (number + 1, 7))


def read(name: str) -> np.ndarray:
    return np.full((2, 2, 3), int(name.split()[1]), np.uint8)


def read_most(name: str) -> np.ndarray:
    if name in ("image 2", "image 9"):
        raise UnreadableImage(f"{name}: cut short")
    return read(name)


@pytest.fixture(autouse=True)
def _count_anew():
    Marks.counted.clear()


@pytest.mark.parametrize("block", [1, 4, 11, 64])
def test_what_is_read_is_what_was_described(tmp_path, block):
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=block)
    assert len(filled) == 11 and Marks.counted == list(range(11))
    for images in (filled, cache.Cache(tmp_path), pickle.loads(pickle.dumps(filled))):
        for number in (10, 0, 3, 4, 7):
            found, wanted = images[number], Marks()(read(NAMES[number]))
            assert found.size == wanted.size
            for name in ("keypoints", "descriptors"):
                ours, theirs = getattr(found, name), getattr(wanted, name)
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape


def test_a_number_outside_is_refused(tmp_path):
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    for number in (11, -1):
        with pytest.raises(IndexError, match=f"image {number} of 11"):
            filled[number]


def test_what_is_there_is_not_described_again(tmp_path):
    cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert len(Marks.counted) == 11
    del before[tmp_path / ".lock"]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_it_goes_on_after_a_failure(tmp_path):
    def failing(name: str) -> np.ndarray:
        if name == "image 6":
            raise RuntimeError("power cut")
        return read(name)

    with pytest.raises(RuntimeError, match="power cut"):
        cache.fill(tmp_path, NAMES, failing, Marks(), block=4)
    with pytest.raises(ValueError, match="not all images are described"):
        cache.Cache(tmp_path)
    Marks.counted.clear()
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert Marks.counted == list(range(4, 11))  # the first block was whole
    assert [int(images.size[0]) for images in filled] == list(range(1, 12))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from kit import checksums
from kit.rerank.local import cache
import test_local_cache as here
save = cache.save_file
def dying(tensors, path):
    save(tensors, path)
    if Path(path).name.startswith("00001"):  # written, not yet renamed
        os.kill(os.getpid(), signal.SIGKILL)
cache.save_file = dying
cache.fill(Path({folder!r}), here.NAMES, here.read, here.Marks(), block=4)
"""


def test_it_goes_on_after_a_kill(tmp_path):
    tests = str(Path(__file__).parent)
    code = KILLED.format(tests=tests, folder=str(tmp_path))
    path = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "00000.safetensors").exists()
    assert not (tmp_path / "00001.safetensors").exists()
    assert list(tmp_path.glob(".00001*"))
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert Marks.counted == list(range(4, 11))
    assert [int(images.size[0]) for images in filled] == list(range(1, 12))
    assert not list(tmp_path.glob(".0*"))  # nor does the half-written file stay


@pytest.mark.parametrize("change, told", [
    ({"describe": Marks(side=99)}, "parameters .*'side': 100.* not .*'side': 99"),
    ({"describe": features.Sift()}, r"describer \(marks, not sift\)"),
    ({"names": NAMES[:10]}, r"images \(11, not 10\)"),
    ({"names": NAMES[::-1]}, "names"),
    ({"block": 5}, r"block \(4, not 5\)"),
])  # fmt: skip
@pytest.mark.parametrize("whole", [True, False])
def test_another_cache_is_made_again(tmp_path, caplog, change, told, whole):
    given = {"names": NAMES, "read": read, "describe": Marks(), "block": 4}
    folder, fresh = tmp_path / "other", tmp_path / "fresh"
    cache.fill(folder, **given)
    if not whole:
        path = folder / "manifest.json"
        about = checksums.read_manifest(path, "")
        checksums.write_manifest(path, about | {"complete": False})
    if isinstance(change.get("describe"), features.Sift):
        change = change | {"read": noise}
    cache.fill(folder, **given | change)
    cache.fill(fresh, **given | change)
    made, expected = (
        {path.name: path.read_bytes() for path in place.iterdir()}
        for place in (folder, fresh)
    )
    assert made == expected
    (line,) = [each.message for each in caplog.records]
    assert re.search(told, line)


@pytest.mark.parametrize("fault", ["flipped", "cut", "zeroed", "swapped", "gone"])
def test_a_damaged_block_is_refused_by_name_and_described_again(tmp_path, fault):
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    path, other = (tmp_path / f"0000{number}.safetensors" for number in (1, 0))
    whole = path.read_bytes()
    half = len(whole) // 2
    damaged = {
        "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
        "cut": whole[:-1],
        "zeroed": bytes(len(whole)),
        "swapped": other.read_bytes(),
    }
    path.unlink() if fault == "gone" else path.write_bytes(damaged[fault])
    with pytest.raises(checksums.Damaged, match="00001.safetensors: .*04_tune_rerank"):
        filled[5]
    Marks.counted.clear()
    again = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert Marks.counted == [4, 5, 6, 7]
    assert path.read_bytes() == whole and again[5].size == (6, 7)


def test_a_damaged_manifest_is_refused_by_name_and_all_is_described_again(tmp_path):
    cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"images": 11', '"images": 10'))
    with pytest.raises(checksums.Damaged, match="manifest.json: damaged"):
        cache.Cache(tmp_path)
    cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert path.read_text() == whole


def test_blocks_without_a_manifest_are_described_again(tmp_path):
    """As a run leaves them that was killed while it removed a cache of other images."""
    cache.fill(tmp_path, NAMES[::-1], read, Marks(), block=4)
    (tmp_path / "manifest.json").unlink()
    filled = cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert [int(images.size[0]) for images in filled] == list(range(1, 12))


def test_opening_it_for_another_describer_is_refused(tmp_path):
    cache.fill(tmp_path, NAMES, read, Marks(), block=4)
    assert len(cache.Cache(tmp_path, Marks())) == 11
    with pytest.raises(ValueError, match="another parameters"):
        cache.Cache(tmp_path, Marks(most=8))
    with pytest.raises(FileNotFoundError, match="no local features"):
        cache.Cache(tmp_path / "elsewhere")


def test_unreadable_images_are_named_and_have_no_keypoints(tmp_path):
    filled = cache.fill(tmp_path, NAMES, read_most, Marks(), block=4)
    assert filled.manifest["unreadable"] == ["image 2", "image 9"]
    assert filled.manifest["keypoints"] == sum(n % 4 for n in range(11) if n not in (2, 9))  # fmt: skip
    assert filled[2].size == (0, 0) and len(filled[2]) == 0
    assert filled[2].descriptors.shape == (0, 4) and len(filled[3]) == 3


def test_no_images_make_an_empty_cache(tmp_path):
    assert len(cache.fill(tmp_path, [], read, Marks())) == 0


def test_a_block_holds_an_image_or_more(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        cache.fill(tmp_path, NAMES, read, Marks(), block=0)


def test_the_number_of_processes_does_not_matter(tmp_path):
    describe = features.Sift(side=128, most=30)
    folders = [tmp_path / "alone", tmp_path / "together"]
    for folder, processes in zip(folders, (0, 2), strict=True):
        cache.fill(folder, NAMES, noise, describe, block=3, processes=processes)
    alone, together = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in folders
    )
    assert alone == together and "00003.safetensors" in alone


@dataclass(frozen=True)
class _Noise:
    """(128, 128, 3) squares of random colours; a process can be sent it."""

    def __call__(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(int(name.split()[1]))
        squares = rng.integers(0, 255, (16, 16, 3))
        return np.kron(squares, np.ones((8, 8, 1))).astype(np.uint8)


noise = _Noise()


def test_a_cache_verifies_like_a_list(tmp_path):
    way = dataclasses.replace(
        verification.backend("sift"), describe=features.Sift(side=128, most=200)
    )
    pictures = [noise(name) for name in NAMES[:3]]
    pictures.append(pictures[0][:, 20:])
    names = list(map(str, range(4)))
    filled = cache.fill(
        tmp_path, names, lambda name: pictures[int(name)], way.describe, block=3
    )
    pairs = [(a, b) for a in range(4) for b in range(a)]
    found = verification.verify(pairs, filled, way)
    kept = [way.describe(picture) for picture in pictures]
    np.testing.assert_array_equal(found, verification.verify(pairs, kept, way))
    assert found[3] > 10  # pair (3, 0)
