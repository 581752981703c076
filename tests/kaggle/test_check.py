"""What Kaggle would refuse or drop later is refused here, in one line that names it."""

import json
import shutil

import pytest

from kit import files
from kit.kaggle import check, manifest, publish
from tests.kaggle import builds

KERNEL = "submission/kernel-metadata.json"
DATASET = "weights/dataset-metadata.json"


@pytest.fixture
def build(tmp_path):
    return builds.make(tmp_path / "build")


def problem(build):
    """The only line that is wrong with a build whose manifest was written anew."""
    manifest.write(build, builds.COMPETITION)
    (line,) = check.problems(build)
    return line


def test_a_build_that_kaggle_takes_has_no_problems(build):
    assert check.problems(build) == []


@pytest.mark.parametrize(
    "file, fields, words",
    [
        (DATASET, {"title": "Short"}, "title 'Short' is not 6 to 50 letters long"),
        (DATASET, {"title": "x" * 51}, "is not 6 to 50 letters long"),
        (DATASET, {"title": None}, "title None is not"),
        (DATASET, {"subtitle": "too short"}, "is not 20 to 80 letters long"),
        (DATASET, {"licenses": []}, "licenses must be exactly one"),
        (DATASET, {"licenses": [{"name": "a"}, {"name": "b"}]}, "exactly one"),
        (DATASET, {"licenses": [{}]}, "licenses must be exactly one"),
        (DATASET, {"licence": "MIT"}, "unknown field 'licence' (close: licenses)"),
        (KERNEL, {"code_file": "gone.ipynb"}, "code_file gone.ipynb is missing"),
        (KERNEL, {"code_file": "../x.ipynb"}, "not a file of this folder"),
        (KERNEL, {"enable_internet": None}, "enable_internet must be written"),
        (KERNEL, {"enable_internet": "false"}, "enable_internet must be written"),
        (KERNEL, {"enable_internet": True}, "code competitions refuse it"),
        (KERNEL, {"is_private": None}, "is_private must be written"),
        (KERNEL, {"machine_shape": None}, "machine_shape is None, not one of Nvidia"),
        (KERNEL, {"machine_shape": "NvidiaTeslaP100"}, "retired; take NvidiaTeslaT4"),
        (KERNEL, {"title": "Another title"}, "makes the slug another-title, not"),
        (KERNEL, {"language": "r"}, "language is 'r', not python"),
        (KERNEL, {"kernel_type": "script"}, "kernel_type is 'script', not notebook"),
        (KERNEL, {"competition_sources": []}, f"lacks {builds.COMPETITION}"),
        (KERNEL, {"competition_sources": "all"}, "must be a list of names"),
        (KERNEL, {"model_sources": ["a/b/c/d"]}, "model a/b/c/d must name its version"),
        (KERNEL, {"kernel_sources": ["lone"]}, "kernel lone is not owner/slug"),
        (KERNEL, {"enable_interent": False}, "(close: enable_internet)"),
    ],
)
def test_metadata_is_refused_for(build, file, fields, words):
    builds.change(build / file, **fields)
    found = [line for line in _written(build) if words in line]
    assert len(found) == 1 and found[0].startswith(file.split("/")[0] + ": ")


def _written(build):
    manifest.write(build, builds.COMPETITION)
    return check.problems(build)


@pytest.mark.parametrize(
    "ref", ["{user}/landmark-weights", "Alice/landmark", "weights"]
)
def test_an_id_that_still_holds_a_placeholder_is_refused(build, ref):
    builds.change(build / DATASET, id=ref)
    assert any("is not owner/slug in small letters" in it for it in _written(build))


@pytest.mark.parametrize("slug, wrong", [("a" * 5, True), ("a" * 6, False)])
def test_the_slug_of_a_dataset_has_six_letters_at_least(build, slug, wrong):
    builds.change(build / DATASET, id=f"alice/{slug}")
    assert any("slug 'aaaaa' is not 6 to 50" in it for it in _written(build)) == wrong


def test_a_dataset_of_others_must_name_its_version(build):
    mine = ["alice/landmark-weights", "alice/landmark-features"]
    builds.change(build / KERNEL, dataset_sources=[*mine, "bob/wheels-of-bob/2"])
    assert _written(build) == []
    builds.change(build / KERNEL, dataset_sources=[*mine, "bob/wheels-of-bob"])
    assert "bob/wheels-of-bob must name its version" in problem(build)


def test_a_dataset_that_the_kernel_does_not_attach_is_refused(build):
    builds.change(build / KERNEL, dataset_sources=["alice/landmark-weights/4"])
    assert "lacks alice/landmark-features, a dataset of this build" in problem(build)


def test_a_folder_in_a_dataset_is_refused_because_the_client_leaves_it_out(build):
    (build / "weights" / "extra").mkdir()
    assert "extra/ would be left out; make it its own dataset" in problem(build)


@pytest.mark.parametrize(
    "name, words",
    [
        ("kernel-metadata.json", "would be left out"),
        ("dataset-cover-image.png", "would be left out"),
        ("wheels.tar.gz", "would be unpacked"),
        ("pictures.ZIP", "would be unpacked"),
    ],
)
def test_a_file_that_would_not_arrive_as_it_is_is_refused(build, name, words):
    (build / "weights" / name).write_text("x")
    assert f"weights: {name} {words}" in problem(build)


def test_a_wheel_is_not_an_archive_to_kaggle(build):
    (build / "weights" / "landmark_kit-0.1.0-py3-none-any.whl").write_text("x")
    assert _written(build) == []


def test_an_empty_file_is_refused(build):
    (build / "weights" / "empty.bin").touch()
    assert "empty.bin is empty" in problem(build)


def test_two_folders_cannot_be_one_dataset(build):
    builds.change(build / "features" / "dataset-metadata.json", **_same_id(build))
    found = _written(build)
    assert "alice/landmark-weights: two folders are this dataset" in found


def _same_id(build):
    return {"id": json.loads((build / DATASET).read_text())["id"]}


def test_the_source_is_measured_as_it_is_sent_and_stays_under_a_megabyte(build):
    notebook = build / "submission" / "submission.ipynb"
    content = files.read_json(notebook)
    content["cells"][1]["outputs"] = [{"output_type": "stream", "text": "x" * 2**20}]
    files.write_json(notebook, content)
    assert _written(build) == []  # outputs are not sent
    room = check.SOURCE_BYTES - len(check.sent_source(notebook))
    content["cells"][1]["source"] += "#" * (room - 1)
    files.write_json(notebook, content)
    assert _written(build) == []
    content["cells"][1]["source"] += "#"
    files.write_json(notebook, content)
    assert "1000000 bytes as sent, not under 1000000" in problem(build)


def test_a_broken_notebook_is_refused(build):
    (build / "submission" / "submission.ipynb").write_text('{"cells": 3}')
    assert "submission.ipynb is not a notebook" in problem(build)


def test_a_build_larger_than_the_quota_is_refused(build, monkeypatch):
    monkeypatch.setattr(check, "PRIVATE_BYTES", 10_000)
    assert "private data an account may hold" in problem(build)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda b: (b / "weights" / "model.json").unlink(), "model.json is missing"),
        (lambda b: (b / "weights" / "model.json").write_text("x"), "has changed since"),
        (lambda b: (b / "stray.txt").write_text("x"), "stray.txt is not in manifest"),
        (lambda b: (b / "manifest.json").unlink(), "run scripts/build_kaggle.py"),
        (lambda b: (b / "manifest.json").write_text("{}"), "names no competition"),
        (lambda b: (b / "manifest.json").write_text("["), "not JSON"),
        (lambda b: (b / "weights" / "parts.json").unlink(), "parts.json is missing"),
        (lambda b: (b / DATASET).unlink(), "dataset-metadata.json is missing"),
        (lambda b: (b / KERNEL).write_text("{"), "kernel-metadata.json is not JSON"),
        (lambda b: shutil.rmtree(b), "manifest.json; run scripts/build_kaggle.py"),
    ],
)
def test_a_build_that_is_not_what_its_manifest_says_is_refused(build, spoil, words):
    spoil(build)
    found = check.problems(build)
    assert any(words in line for line in found)
    assert all("\n" not in line for line in found)
    with pytest.raises((ValueError, OSError), match="."):
        publish.plan(build)


def test_the_manifest_has_size_and_hash_of_every_file_but_itself(build):
    made = manifest.read(build)
    there = {p.relative_to(build).as_posix() for p in build.rglob("*") if p.is_file()}
    assert {part.path for part in made.parts} == there - {"manifest.json"}
    for part in made.parts:
        assert part.size == (build / part.path).stat().st_size
        assert part.sha256 == files.sha256(build / part.path)
    assert made.competition == builds.COMPETITION
    parts = manifest.read_parts(build / "features" / "parts.json")
    assert [part.path for part in parts] == ["ids.bin", "part-0.bin", "part-1.bin"]


def test_the_table_adds_up(build):
    *_, last = manifest.table(build).splitlines()
    total = sum(part.size for part in manifest.read(build).parts)
    assert last.split() == ["in", "all", "11", f"{total / 1e6:.1f}"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"path": "../stolen"}, "'../stolen' is empty, absolute, or leads elsewhere"),
        ({"path": "/etc/passwd"}, "absolute"),
        ({"path": ""}, "'' is empty"),
        ({"path": "a\x00b"}, "cannot be shown"),
        ({"path": "n" * 300}, "is longer than"),
        ({"path": 7}, "7 is not text"),
        ({"path": None}, "None is not text"),
        ({"size": -1}, "size -1 is no number of bytes"),
        ({"size": "5"}, "size '5' is no"),
        ({"size": 5.0}, "size 5.0 is no"),
        ({"size": True}, "size True is no"),
        ({"sha256": "0" * 63}, "is no SHA-256"),
        ({"sha256": 5}, "is no SHA-256"),
        ({"path": "twin"}, "'twin' stands there twice"),
    ],
)
def test_parts_from_elsewhere_are_refused_by_name(tmp_path, change, words):
    part = {"path": "twin", "size": 5, "sha256": "0" * 64}
    path = tmp_path / manifest.PARTS
    path.write_text(json.dumps({"parts": [part, part | {"path": "b"} | change]}))
    with pytest.raises(ValueError) as told:
        manifest.read_parts(path)
    text = str(told.value)
    assert text.startswith(f"{path}: part 2") and words in text
    assert text.isprintable() and len(text) < 400


@pytest.mark.parametrize(
    "value", ["[]", "7", "{}", '{"parts": {}}', '{"parts": [1]}', '{"parts": [{}]}']
)
def test_what_lists_no_parts_is_refused(tmp_path, value):
    path = tmp_path / manifest.PARTS
    path.write_text(value)
    with pytest.raises(ValueError, match=str(path)):
        manifest.read_parts(path)
