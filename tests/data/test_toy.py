import csv
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kit.data import toy
from kit.data.toy import ToyConfig, plan, render

TINY = ToyConfig(landmarks=8, images=80, side=64)
TINIEST = ToyConfig(landmarks=4, images=40, side=32)
WIKI = "http://commons.wikimedia.org/wiki/Category:"
HEADERS = {
    "train/train": "id,url,landmark_id",
    "train/train_clean": "landmark_id,images",
    "train/train_label_to_category": "landmark_id,category",
    "index/index": "id",
    "index/index_image_to_landmark": "id,landmark_id",
    "index/index_label_to_category": "landmark_id,category",
    "test/test": "id",
    "test/retrieval_solution_v2.1": "id,images,Usage",
    "test/recognition_solution_v2.1": "id,landmarks,Usage",
    "odd_files": "split,id,kind",
}


class Tables:
    """What the CSVs of a set say."""

    def __init__(self, root: Path):
        self.root = root
        self.ids = {s: [row["id"] for row in self.rows(f"{s}/{s}")] for s in toy.SPLITS}
        self.category = {
            s: self.pairs(f"{s}/{s}_label_to_category") for s in ("train", "index")
        }
        self.clean = {k: v.split() for k, v in self.pairs("train/train_clean").items()}
        self.place = self.pairs("index/index_image_to_landmark")
        answers = self.pairs("test/retrieval_solution_v2.1")
        self.answers = {k: v.split() for k, v in answers.items() if v != "None"}
        self.odd = self.rows("odd_files")

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.root / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def pairs(self, name: str) -> dict[str, str]:
        """The second column by the first."""
        return dict(list(row.values())[:2] for row in self.rows(name))

    def path(self, split: str, name: str) -> Path:
        return self.root / split / name[0] / name[1] / name[2] / f"{name}.jpg"


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return Tables(render(tmp_path_factory.mktemp("toy") / "set", TINY))


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_the_tables_have_the_official_names_and_columns(tables):
    found = {path: path.read_text("utf-8") for path in tables.root.rglob("*.csv")}
    headers = {
        str(path.relative_to(tables.root).with_suffix("")): text.split("\n")[0]
        for path, text in found.items()
    }
    assert headers == HEADERS


def test_every_listed_image_is_there_and_no_other(tables):
    for split, ids in tables.ids.items():
        expected = {tables.path(split, name) for name in ids}
        assert set((tables.root / split).rglob("*.jpg")) == expected


def test_the_counts_add_up(tables):
    counts = json.loads((tables.root / "toy.json").read_text())["counts"]
    assert sum(counts.values()) == TINY.images
    for split, ids in tables.ids.items():
        assert len(ids) == sum(
            n for name, n in counts.items() if name.startswith(split)
        )


def test_ids_are_text_of_which_some_look_like_numbers(tables):
    for ids in tables.ids.values():
        assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids)
        assert any(re.fullmatch("0+[0-9]+", name) for name in ids)
        assert any(re.fullmatch("[0-9]+e[0-9]+", name) for name in ids)
    assert len({name for ids in tables.ids.values() for name in ids}) == TINY.images


def test_the_longest_side_of_an_image_is_the_one_asked_for(tables):
    images = [cv2.imread(str(tables.path("test", name))) for name in tables.ids["test"]]
    assert {max(image.shape) for image in images} == {TINY.side}
    assert len({image.shape for image in images}) > 1


def test_clean_lists_are_subsets_of_train(tables):
    landmark = {row["id"]: row["landmark_id"] for row in tables.rows("train/train")}
    assert len(tables.clean) >= 2
    for label, names in tables.clean.items():
        assert len(names) >= 3
        assert {landmark[name] for name in names} == {label}
    assert set(landmark.values()) > set(tables.clean)  # the others are noise only


def test_wrong_labels_have_their_share():
    kinds = Counter(shot.kind for shot in plan(ToyConfig(wrong=0.2)))
    everything = kinds["clean"] + kinds["missed"] + kinds["wrong"]
    assert kinds["wrong"] / everything == pytest.approx(0.2, abs=0.01)


def test_wrong_labels_are_in_train_and_not_in_the_clean_lists(tables):
    wrong = {shot.id for shot in plan(TINY) if shot.kind == "wrong"}
    assert wrong
    assert wrong <= set(tables.ids["train"]) - set().union(*tables.clean.values())


def test_images_show_their_label_unless_they_are_wrong_or_noise():
    for shot in plan(TINY):
        assert (shot.shows == shot.label) == (shot.kind not in ("wrong", "noise"))


def test_only_the_category_joins_train_and_index(tables):
    train = {url: label for label, url in tables.category["train"].items()}
    index = {url: label for label, url in tables.category["index"].items()}
    assert set(train) & set(index)
    assert set(index) - set(train)
    assert set(train.values()) & set(index.values())
    assert all(train[url] != index[url] for url in set(train) & set(index))


def test_categories_are_urls_with_commas_and_percent_signs(tables):
    for category in tables.category.values():
        urls = set(category.values())
        assert len(urls) == len(category)
        assert all(url.startswith(WIKI) and url.isascii() for url in urls)
        assert any("," in url for url in urls)
        assert any("%C3%" in url for url in urls)


def test_every_train_landmark_is_in_one_country(tables):
    files = list((tables.root / "train/country").iterdir())
    assert {"NA.json", "XK.json", "OTHER.json"} <= {file.name for file in files}
    entries = [entry for file in files for entry in json.loads(file.read_text())]
    names = {str(entry["id"]): WIKI + entry["name"] for entry in entries}
    assert len(names) == len(entries)
    assert names == tables.category["train"]


def test_a_query_s_answers_are_all_images_of_its_place(tables):
    assert tables.answers
    for names in tables.answers.values():
        (label,) = {tables.place[name] for name in names}
        assert set(names) == {
            name for name, other in tables.place.items() if other == label
        }
        assert len(names) >= 3


def test_the_index_has_images_that_answer_nothing(tables):
    assert set(tables.ids["index"]) - set().union(*tables.answers.values())


def test_queries_are_public_private_or_ignored(tables):
    usage = tables.rows("test/retrieval_solution_v2.1")
    assert sorted(row["id"] for row in usage) == sorted(tables.ids["test"])
    assert {row["Usage"] for row in usage if row["images"] == "None"} == {"Ignored"}
    count = Counter(row["Usage"] for row in usage)
    assert count["Ignored"] == len(usage) - len(tables.answers) > 0
    assert 2 * count["Public"] == pytest.approx(count["Private"], abs=2)


def test_recognition_answers_with_the_train_landmark_if_there_is_one(tables):
    landmark = tables.pairs("test/recognition_solution_v2.1")
    assert set(landmark) == set(tables.ids["test"])
    number = {url: label for label, url in tables.category["train"].items()}
    expected = dict.fromkeys(landmark, "")
    for query, names in tables.answers.items():
        category = tables.category["index"][tables.place[names[0]]]
        expected[query] = number.get(category, "")
    assert landmark == expected
    assert any(not landmark[query] for query in tables.answers)  # an unknown place


def test_odd_files_are_what_their_list_says(tables):
    kinds = Counter((row["split"], row["kind"]) for row in tables.odd)
    assert sorted(kinds.elements()) == [
        ("index", "empty"),
        ("index", "truncated"),
        ("train", "empty"),
        ("train", "grey"),
        ("train", "png"),
        ("train", "truncated"),
    ]
    for row in tables.odd:
        data = tables.path(row["split"], row["id"]).read_bytes()
        if row["kind"] == "empty":
            assert data == b""
        elif row["kind"] == "truncated":
            assert data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9")
        elif row["kind"] == "png":
            assert data.startswith(b"\x89PNG")
        else:
            pixels = np.frombuffer(data, np.uint8)
            assert cv2.imdecode(pixels, cv2.IMREAD_UNCHANGED).ndim == 2


def test_odd_files_are_neither_clean_nor_answers(tables):
    used = [*tables.clean.values(), *tables.answers.values(), tables.ids["test"]]
    assert not {row["id"] for row in tables.odd} & set().union(*used)


def test_all_other_files_are_colour_jpegs(tables):
    odd = {row["id"] for row in tables.odd}
    for split, ids in tables.ids.items():
        for name in set(ids) - odd:
            data = np.fromfile(tables.path(split, name), np.uint8)
            assert bytes(data[:2]) == b"\xff\xd8" and bytes(data[-2:]) == b"\xff\xd9"
            assert cv2.imdecode(data, cv2.IMREAD_UNCHANGED).ndim == 3


def test_the_bytes_do_not_depend_on_the_number_of_workers(tables, tmp_path):
    assert digests(render(tmp_path / "set", TINY, workers=3)) == digests(tables.root)


def test_another_seed_gives_other_pictures(tmp_path):
    one = digests(render(tmp_path / "one", TINIEST))
    two = digests(render(tmp_path / "two", replace(TINIEST, seed=1)))
    same = {name for name in one if name.endswith(".jpg") and name in two}
    assert same  # the ids that look like numbers
    assert all(one[name] != two[name] for name in same)


def test_a_finished_set_is_left_as_it_is(tables):
    before = {path: path.stat().st_mtime_ns for path in tables.root.rglob("*")}
    assert render(tables.root, TINY) == tables.root
    assert before == {path: path.stat().st_mtime_ns for path in tables.root.rglob("*")}


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(toy, "_write_tables", fail)
    with pytest.raises(OSError, match="disk full"):
        render(tmp_path / "set", TINIEST)
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_the_sizes(tmp_path, monkeypatch, capsys):
    sizes = ["--landmarks", "4", "--images", "40", "--side", "32", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path / "set"), *sizes])
    toy.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    made_by = json.loads((tmp_path / "set/toy.json").read_text())["config"]
    assert ToyConfig(**made_by) == replace(TINIEST, seed=7)


@pytest.mark.parametrize("size", [{"landmarks": 3}, {"images": 79}, {"side": 31}])
def test_too_small_a_size_is_refused_with_the_minimum(tmp_path, size):
    minimum = "at least 4 landmarks, 10 images for each, side 32"
    with pytest.raises(ValueError, match=minimum):
        render(tmp_path / "set", replace(TINY, **size))
    assert not list(tmp_path.iterdir())


def test_shares_that_leave_too_few_images_are_refused():
    with pytest.raises(ValueError, match="cannot show 6 places 3 times each"):
        plan(replace(TINY, wrong=0.9))


def test_another_config_in_the_folder_is_refused(tables):
    with pytest.raises(
        FileExistsError, match="set does not hold .*seed=5.*another folder"
    ):
        render(tables.root, replace(TINY, seed=5))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="empty it or name another folder"):
        render(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
