"""The clean list in the official form, read back by whoever reads the official one."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from kit.answers.cleaning import rule, table
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Rule
from kit.data import tables
from tests.answers.cleaning.conftest import image_list, near, random_given


def given_list() -> Labelled:
    """Labels 3, 0, 7 in the order of the list; one without a label comes first."""
    labels = [-1, 3, 0, 3, 7, 0, 7, 3]
    vectors = np.random.default_rng(0).normal(size=(8, 4))
    return Labelled(image_list(labels), near(vectors, 7))


def kept(given: Labelled, rows) -> rule.Kept:
    confirmed = np.isin(np.arange(len(given)), rows)
    alone = np.zeros(len(given), bool)
    return rule.apply(confirmed, alone, given.labels, Rule(min_images=1))


def test_the_table_has_the_official_form(tmp_path):
    given = given_list()
    path = table.write(tmp_path / "train_clean.csv", given, kept(given, range(8)), {})
    assert path.read_bytes() == (
        b"landmark_id,images\n"
        b"897,0000000000000001 0000000000000003 0000000000000007\n"
        b"900,0000000000000002 0000000000000005\n"
        b"893,0000000000000004 0000000000000006\n"
    )


def test_landmarks_stand_as_the_list_first_names_them_even_by_a_dropped_image(tmp_path):
    given = given_list()
    path = table.write(
        tmp_path / "train_clean.csv", given, kept(given, [2, 4, 6, 7]), {}
    )
    listed = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert listed["landmark_id"].tolist() == ["897", "900", "893"]
    assert listed["images"].tolist()[0] == "0000000000000007"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_back_is_what_stays(tmp_path, seed):
    given = random_given(seed)
    rows = np.random.default_rng(seed).random(60) < 0.5
    stays = kept(given, np.flatnonzero(rows))
    path = table.write(tmp_path / "train_clean.csv", given, stays, {})
    np.testing.assert_array_equal(table.trusted(path, given), stays.images)
    listed = tables.read_csv(path, ("landmark_id", "images"))
    ids = given.images.ids
    landmarks = given.images.rows["landmark_id"]
    for landmark, names in zip(listed["landmark_id"], listed["images"], strict=True):
        expected = ids[stays.images & (landmarks == landmark)]
        assert names.split(" ") == expected.tolist()


def test_an_image_under_another_landmark_is_not_trusted(tmp_path):
    given = given_list()
    path = tmp_path / "other.csv"
    path.write_text("landmark_id,images\n897,0000000000000002 0000000000000003 beef\n")
    assert np.flatnonzero(table.trusted(path, given)).tolist() == [3]


@pytest.mark.parametrize(
    "row",
    [
        "897,0000000000000001.jpg 0000000000000003.jpg",
        "897.0,0000000000000001 0000000000000003",
        "900,0000000000000001 0000000000000003",  # both are of 897
        "897,1 3",
        "",
    ],
)
def test_a_trusted_list_that_names_no_image_of_the_list_must_be_refused(tmp_path, row):
    path = tmp_path / "other.csv"
    path.write_text(f"landmark_id,images\n{row}\n")
    with pytest.raises(ValueError, match="other.csv: no image of list") as refused:
        table.trusted(path, given_list())
    assert all(word in str(refused.value) for word in row.split(","))


def test_beside_it_stands_how_it_was_made(tmp_path):
    given, how = given_list(), {"rule": {"mode": "votes"}}
    stays = kept(given, [1, 3, 4])
    path = table.write(tmp_path / "train_clean.csv", given, stays, how)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["how"] == how and about["list"]["hash"] == "hash of full"
    assert (about["landmarks"], about["images"]) == (2, 3)
    assert about["dropped"]["without a label"] == 1
    assert about["dropped"]["not confirmed"] == 4
    assert about["hash"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_table_is_written_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    given = given_list()
    path = table.write(tmp_path / "train_clean.csv", given, kept(given, [1, 3]), {})
    before = path.read_bytes()
    written = []

    class Full:
        def __init__(self, file, **_):
            self.file = file

        def writerow(self, row):
            written.append(row)
            if len(written) == 2:
                raise OSError("disk full")
            self.file.write(",".join(row) + "\n")

    monkeypatch.setattr(table.csv, "writer", Full)
    with pytest.raises(OSError, match="disk full"):
        table.write(path, given, kept(given, range(8)), {})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "train_clean.csv",
        "train_clean.json",
    ]


def test_nothing_that_stays_is_refused(tmp_path):
    given = given_list()
    with pytest.raises(
        ValueError, match="no image of list full stays .*; ask for less$"
    ):
        table.write(tmp_path / "train_clean.csv", given, kept(given, []), {})
    assert not list(tmp_path.iterdir())
