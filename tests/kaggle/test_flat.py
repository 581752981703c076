"""A work folder travels in flat folders and is linked back, whole or not at all."""

import shutil
from pathlib import Path, PurePosixPath

import pytest

from kit.kaggle import flat, manifest

PAIRS = {
    "lists/index_train.csv": "lists__index_train.csv",
    "features/toy/c2x/index_train/ids.npy": "features__toy__c2x__index_train__ids.npy",
    "answers/toy/chain.json": "answers__toy__chain.json",
    "runs/glr2021/b6/_x/model.json": "runs__glr2021__b6___x__model.json",
    "alone.json": "alone.json",
}


@pytest.mark.parametrize("path, name", PAIRS.items())
def test_a_path_and_its_flat_name_belong_to_each_other(path, name):
    assert flat.name(PurePosixPath(path)) == name
    assert flat.path(name) == Path(path)


@pytest.mark.parametrize(
    "path",
    ["a__b/c.npy", "a/b__c", "a_/b", "__a/b", "/a/b", "../a", "a/../b", "."],
)
def test_a_path_whose_name_would_mean_another_is_refused(path):
    with pytest.raises(ValueError, match="cannot travel in a flat folder.*rename it"):
        flat.name(PurePosixPath(path))


@pytest.mark.parametrize("name", ["", "..__a", "a____b", "__a", "a__", ".__a", "a/b"])
def test_a_name_that_leads_out_of_the_work_folder_is_refused(name):
    with pytest.raises(ValueError, match="is not the flat name of a file"):
        flat.path(name)


CONTENT = {
    "lists": {"lists__full.csv": "id\n", "lists__full.json": "{}"},
    "models": {"runs__toy__c2x__model.json": "{ }", "answers__toy__chain.json": "[]"},
    "kit": {"landmark_kit-0.1.0-py3-none-any.whl": "wheel"},
}


@pytest.fixture
def mounts(tmp_path):
    """Datasets as they are mounted: without their metadata."""
    build = tmp_path / "build"
    for folder, content in CONTENT.items():
        (build / folder).mkdir(parents=True)
        (build / folder / manifest.DATASET).write_text("{}")
        for name, text in content.items():
            (build / folder / name).write_text(text)
    manifest.write(build, "landmarks")
    for folder in CONTENT:
        (build / folder / manifest.DATASET).unlink()
    return [build / folder for folder in CONTENT]


def tree(work):
    return {
        path.relative_to(work).as_posix(): path.read_text()
        for path in work.rglob("*")
        if path.is_file()
    }


EXPECTED = {
    "lists/full.csv": "id\n",
    "lists/full.json": "{}",
    "runs/toy/c2x/model.json": "{ }",
    "answers/toy/chain.json": "[]",
}


def test_all_parts_but_wheels_are_linked_to_their_places(mounts, tmp_path):
    flat.link(mounts, tmp_path / "work")
    assert tree(tmp_path / "work") == EXPECTED
    assert (tmp_path / "work" / "lists" / "full.csv").is_symlink()


def test_linking_again_changes_nothing_and_follows_mounts_that_moved(mounts, tmp_path):
    work = tmp_path / "work"
    flat.link(mounts, work)
    flat.link(mounts, work)
    assert tree(work) == EXPECTED
    moved = [shutil.move(mount, tmp_path / f"m-{mount.name}") for mount in mounts]
    assert tree(work) == {}
    flat.link(list(map(Path, moved)), work)
    assert tree(work) == EXPECTED


def test_mounts_may_be_named_from_the_working_folder(mounts, tmp_path, monkeypatch):
    monkeypatch.chdir(mounts[0].parent)
    flat.link([Path(mount.name) for mount in mounts], tmp_path / "work")
    assert tree(tmp_path / "work") == EXPECTED


def test_other_files_of_the_work_folder_stay(mounts, tmp_path):
    (tmp_path / "work" / "lists").mkdir(parents=True)
    (tmp_path / "work" / "lists" / "query.csv").write_text("own")
    flat.link(mounts, tmp_path / "work")
    assert tree(tmp_path / "work") == EXPECTED | {"lists/query.csv": "own"}


def test_a_file_is_never_replaced_by_a_link(mounts, tmp_path):
    (tmp_path / "work" / "lists").mkdir(parents=True)
    (tmp_path / "work" / "lists" / "full.csv").write_text("own")
    with pytest.raises(FileExistsError, match="full.csv is there already, and is no"):
        flat.link(mounts, tmp_path / "work")
    assert tree(tmp_path / "work") == {"lists/full.csv": "own"}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda m: (m / "lists__full.csv").unlink(), "lists__full.csv is missing"),
        (
            lambda m: (m / "lists__full.csv").write_text("id"),
            "lists__full.csv has 2 bytes, not 3",
        ),
        (lambda m: (m / "parts.json").unlink(), "no .*parts.json"),
        (lambda m: (m / "parts.json").write_text("["), "not JSON"),
    ],
)
def test_a_mount_that_is_not_what_its_parts_say_is_refused(
    mounts, tmp_path, spoil, words
):
    spoil(mounts[0])
    with pytest.raises(ValueError, match=f"lists: wrong manifest: .*{words}"):
        flat.link(mounts[::-1], tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_two_mounts_with_the_same_path_are_refused(mounts, tmp_path):
    shutil.copytree(mounts[0], tmp_path / "twin")
    with pytest.raises(
        ValueError, match="^lists__full.csv is in .*lists and in .*twin"
    ):
        flat.link([*mounts, tmp_path / "twin"], tmp_path / "work")
    assert not (tmp_path / "work").exists()
