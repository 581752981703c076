"""Inliers of pairs on disk: each once, the same bytes however the work was divided or cut short."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kit import files, launch
from kit.answers.cleaning import pairs
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.verified import Verified
from kit.data import images as decoding
from kit.rerank.local import features, matching, verification
from kit.rerank.local.verification import Backend, Geometry
from tests.answers.cleaning.conftest import image_list, near, walked

ROOT = Path(__file__).resolve().parents[3]
WAY = Backend(features.Sift(side=160, most=300))
ABOUT = {"model": {"name": "clean", "hash": "a"}, "rows": 30}
MOST = 3  # of nine images of a landmark: who asks whom is not mutual


class Slow(features.Sift):
    """The same features after a while."""

    def __call__(self, image):
        time.sleep(0.3)
        return super().__call__(image)


def verify(folder: Path, given: tuple, way: Backend = WAY, **values) -> Verified:
    data, images, graph = given
    about = values.pop("features", ABOUT)
    values = {"most": MOST} | values
    return pairs.verify(folder, Labelled(images, graph), about, data, way, **values)


def content(folder: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert "manifest.json" in found
    return found


def rows(verified: Verified) -> np.ndarray:
    return np.concatenate(list(verified.blocks()))


def unreadable(given: tuple) -> int:
    data, images, _ = given
    sizes = [(data / path).stat().st_size for path in images.rows["path"]]
    return int(np.argmin(sizes))


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory) -> Verified:
    """In one go, in this process, in several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "BLOCK", 8)
        return verify(tmp_path_factory.mktemp("done") / "sift", pictures)


@pytest.fixture
def blocks_of_8(monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 8)


def test_each_pair_has_the_inliers_of_its_two_images(pictures, done):
    data, images, _ = pictures
    none = features.nothing(WAY.describe.dim, (0, 0))
    described = []
    for number, path in enumerate(images.rows["path"]):
        cut = number == unreadable(pictures)
        image = None if cut else decoding.decode((data / path).read_bytes(), path)
        described.append(none if cut else WAY.describe(image))
    found = rows(done)
    assert found.dtype == np.int32 and len(found) > 30
    for one, other, inliers, _ in found.tolist():
        expected = verification.count(described[one], described[other], WAY)
        assert inliers == expected
    assert (found[:, 2] > 15).any() and (found[:, 2] < 8).any()


def test_each_pair_stands_once_with_who_asked(pictures, done):
    _, images, graph = pictures
    whose: dict[tuple[int, int], int] = {}
    candidates = walked(Labelled(images, graph), MOST)
    for image, others in enumerate(candidates.tolist()):
        for other in others:
            if other >= 0:
                pair = min(image, other), max(image, other)
                whose[pair] = whose.get(pair, 0) + (1 if image < other else 2)
    found = [((a, b), bits) for a, b, _, bits in rows(done).tolist()]
    assert len(found) == len(whose) == done.manifest["pairs"]
    assert dict(found) == whose
    assert set(whose.values()) == {1, 2, 3}
    np.testing.assert_array_equal(done.candidates, candidates)
    assert len(done) == len(images)


def test_directed_gives_each_candidate_of_each_image(done):
    table = {(a, b): n for a, b, n, _ in rows(done).tolist()}
    found = {
        (int(image), int(other)): int(count)
        for part in done.directed()
        for image, other, count in zip(*part, strict=True)
    }
    expected = {
        (image, other): table[min(image, other), max(image, other)]
        for image, others in enumerate(done.candidates.tolist())
        for other in others
        if other >= 0
    }
    assert found == expected
    assert sum(len(part[0]) for part in done.directed()) == len(expected)


def test_an_image_that_cannot_be_read_has_no_inliers_and_is_told(
    pictures, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        found = verify(tmp_path / "sift", pictures)
    cut = unreadable(pictures)
    path = pictures[1].rows["path"][cut]
    table = rows(found)
    own = (table[:, :2] == cut).any(axis=1)
    assert own.any() and not table[own, 2].any()
    assert found.manifest["unreadable"] == [path]
    assert f"1 images could not be read, such as {path}" in caplog.text


def test_lost_pictures_are_refused_and_verified_when_they_are_back(
    pictures, done, tmp_path, blocks_of_8
):
    folder = tmp_path / "sift"
    lost = tmp_path / "nowhere", *pictures[1:]
    with pytest.raises(ValueError, match="images cannot be read, such as .*again"):
        verify(folder, lost)
    assert content(verify(folder, pictures).folder) == content(done.folder)


def test_what_could_not_be_read_before_a_kill_is_not_told_of_a_whole_block(
    pictures, done, tmp_path, blocks_of_8
):
    folder = tmp_path / "sift"
    folder.mkdir()
    (folder / "00001.json").write_text('["a path"]')  # its block never came
    assert content(verify(folder, pictures).folder) == content(done.folder)


def test_less_than_one_candidate_is_refused(pictures, tmp_path):
    for most in (0, -3):
        with pytest.raises(ValueError, match=f"^most is {most}; it is at least 1"):
            verify(tmp_path / "sift", pictures, most=most)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", [1, 8, 1000])
def test_the_pairs_do_not_depend_on_the_blocks(
    pictures, done, tmp_path, monkeypatch, block
):
    monkeypatch.setattr(pairs, "BLOCK", block)
    found = verify(tmp_path / "sift", pictures)
    np.testing.assert_array_equal(rows(found), rows(done))
    assert found.manifest["blocks"] == {1: 6, 8: 5, 1000: 1}[block]
    assert found.manifest["unreadable"] == done.manifest["unreadable"]


@pytest.mark.parametrize("largest", [1, 4])
def test_large_landmarks_go_by_disk_and_come_out_the_same(
    pictures, done, tmp_path, monkeypatch, largest
):
    filled = []
    fill = pairs.cache.fill

    def told(folder, *rest, **values):
        assert not list(folder.parent.glob("*.local"))  # one landmark's at a time
        filled.append(folder)
        return fill(folder, *rest, **values)

    monkeypatch.setattr(pairs.cache, "fill", told)
    monkeypatch.setattr(pairs, "BLOCK", 8)
    monkeypatch.setattr(pairs, "IN_MEMORY", largest)
    found = verify(tmp_path / "sift", pictures)
    sizes = pictures[1].rows["label"].value_counts()
    assert len(filled) == (sizes > largest).sum() > 0
    np.testing.assert_array_equal(rows(found), rows(done))
    assert found.manifest["unreadable"] == done.manifest["unreadable"]
    assert not list(found.folder.glob("*.local"))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_number_of_processes_does_not_matter(
    pictures, done, tmp_path, blocks_of_8, processes
):
    found = verify(tmp_path / "sift", pictures, processes=processes)
    assert content(found.folder) == content(done.folder)


def test_landmarks_of_one_image_and_images_without_a_label_have_no_pairs(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4, 3))
    given = tmp_path, image_list([0, 1, -1, -1]), near(vectors, 3)
    found = verify(tmp_path / "sift", given)
    assert list(found.blocks()) == [] and found.manifest["pairs"] == 0
    assert (np.asarray(found.candidates) == -1).all()


def test_what_is_done_is_not_done_again(pictures, done, blocks_of_8, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    monkeypatch.setattr(pairs.verification, "verify", None)
    again = verify(done.folder, pictures)
    np.testing.assert_array_equal(rows(again), rows(done))
    after = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    assert {**after, done.folder / ".lock": 0} == {**before, done.folder / ".lock": 0}


def test_when_the_time_is_over_it_stops_and_goes_on_later(
    pictures, done, tmp_path, blocks_of_8, monkeypatch
):
    folder = tmp_path / "sift"
    monkeypatch.setenv(launch.STOP_AT, "1")
    with pytest.raises(launch.Stopped, match="the time is over; run it again"):
        verify(folder, pictures)
    assert [path.name for path in sorted(folder.glob("0*.npy"))] == ["00000.npy"]
    with pytest.raises(ValueError, match="not all pairs are verified; go on with it"):
        Verified(folder)
    monkeypatch.delenv(launch.STOP_AT)
    assert content(verify(folder, pictures).folder) == content(done.folder)


@pytest.mark.parametrize("change, told", [
    ({"images": replace(image_list([0]), hash="else")}, "another list"),
    ({"features": ABOUT | {"rows": 31}}, "another features"),
    ({"graph": 20}, r"another neighbours \(40, not 20\)"),
    ({"most": 2}, r"another most \(3, not 2\)"),
    ({"seed": 1}, r"another seed \(0, not 1\)"),
    ({"way": Backend(features.Sift(side=170, most=300))}, "another parameters"),
    ({"way": replace(WAY, match=matching.Nearest(0.8))}, "another match"),
    ({"way": replace(WAY, match=matching.Ranked())}, "another matcher"),
    ({"way": replace(WAY, geometry=Geometry(threshold=9.0))}, "another geometry"),
])  # fmt: skip
def test_pairs_verified_otherwise_are_made_again(
    pictures, done, blocks_of_8, tmp_path, monkeypatch, caplog, change, told
):
    data, images, graph = pictures
    change = dict(change)
    if "images" in change:
        images = replace(images, hash=change.pop("images").hash)
    if "graph" in change:
        k = change.pop("graph")
        graph = replace(graph, rows=graph.rows[:, :k], scores=graph.scores[:, :k])
    folder = shutil.copytree(done.folder, tmp_path / "sift")

    def stop(*_: object) -> None:
        raise launch.Stopped

    monkeypatch.setattr(pairs.candidates, "write", stop)  # the first thing that is made
    with pytest.raises(launch.Stopped):
        verify(folder, (data, images, graph), **change)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "manifest.json"]
    assert not files.read_json(folder / "manifest.json")["complete"]
    (line,) = [each.message for each in caplog.records]
    assert re.search(told, line)


def test_pairs_made_again_are_those_of_an_empty_folder(pictures, done, tmp_path):
    folder = shutil.copytree(done.folder, tmp_path / "sift")
    verify(folder, pictures, most=2)
    fresh = verify(tmp_path / "fresh", pictures, most=2)
    assert content(folder) == content(fresh.folder)


def test_pairs_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no verified pairs in .* verify them"):
        Verified(tmp_path)


BEGUN = """
import os, signal
from pathlib import Path
from kit.answers.cleaning import pairs, verified
from tests.answers.cleaning import conftest, test_pairs
pairs.BLOCK, pairs.IN_MEMORY = 8, {largest}
save = verified.np.save
def dying(file, table, **values):
    save(file, table, **values)
    if Path(file.name).name.startswith(".0000{last}"):  # written, not yet renamed
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
verified.np.save = dying
given = conftest.restored(Path({given!r}))
test_pairs.verify(Path({folder!r}), given, test_pairs.{way}, processes={processes})
"""
SLOW = replace(WAY, describe=Slow(side=160, most=300))


def begun(given: tuple, folder: Path, **values) -> subprocess.Popen:
    values = {"way": "WAY", "processes": 0, "largest": 1000, "last": "x"} | values
    code = BEGUN.format(given=str(given[0]), folder=str(folder), **values)
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}
    )


def test_it_goes_on_after_a_kill(pictures, done, tmp_path, blocks_of_8):
    folder = tmp_path / "sift"
    assert begun(pictures, folder, last=2).wait(60) == -signal.SIGKILL
    assert (folder / "00001.npy").exists() and not (folder / "00002.npy").exists()
    assert list(folder.glob(".00002*"))
    assert content(verify(folder, pictures).folder) == content(done.folder)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [3, 1000])
@pytest.mark.parametrize("before, after", [(0, 2), (2, 0), (2, 2)])
def test_a_kill_at_any_moment_changes_nothing(
    pictures, tmp_path, blocks_of_8, monkeypatch, before, after, largest
):
    monkeypatch.setattr(pairs, "IN_MEMORY", largest)
    folder = tmp_path / "sift"
    values = {"way": "SLOW", "processes": before, "largest": largest}
    for patience in (0.4, 1.1):  # seconds after a file has come
        running = begun(pictures, folder, **values)
        there = len(list(folder.glob("*.npy")))
        while len(list(folder.glob("*.npy"))) == there and running.poll() is None:
            time.sleep(0.01)
        time.sleep(patience)
        running.kill()
        assert running.wait(30) == -signal.SIGKILL
        left = content(folder)
        time.sleep(1.0)
        assert content(folder) == left  # nobody works on
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    whole = verify(tmp_path / "whole", pictures).folder
    assert content(verify(folder, pictures, processes=after).folder) == content(whole)
