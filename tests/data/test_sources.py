import csv
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.data import lists, sources, tables

BOTH = ("AM", "AZ", "CY", "GE", "KZ", "RU", "TR")  # on two continents
PLACES = {
    "Asia",
    "Europe",
    "Africa",
    "North America",
    "South America",
    "Antarctica",
    "Oceania",
    "OTHER",
}


def refused(error, kind):
    """The message, which is one line."""
    assert type(error.value) is kind
    message = str(error.value)
    assert message and "\n" not in message
    return message


def replace_in(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def labels_of(table):
    """id -> label."""
    return dict(zip(table["id"], table["label"], strict=True))


# CSVs as text


def test_a_csv_is_read_as_text(tmp_path):
    cells = ["0000000000012345", "123456789012e345", "1e5", "007", "NA", "None", "nan"]
    cells += ["", "null", "-1", "1.0", "TRUE", " a "]
    path = tmp_path / "table.csv"
    path.write_text("id,x\n" + "".join(f"{cell},{cell}\n" for cell in cells))
    table = tables.read_csv(path, ("id", "x"))
    assert table["id"].tolist() == table["x"].tolist() == cells
    assert all(type(cell) is str for cell in table["id"])


def test_a_csv_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tables.read_csv(tmp_path / "none.csv", ("id",))
    message = refused(error, FileNotFoundError)
    assert message == f"{tmp_path / 'none.csv'}: no such file"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n\xff\xfe",
        b"id,x\n1,2\n1,2,3\n",
        b"id,x\n1,2,3\n4,5,6\n",
        b'id,x\n"1,2\n3',
    ],
    ids=["empty", "binary", "a longer line", "all lines longer", "open quote"],
)
def test_a_file_that_is_no_csv_is_refused(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        tables.read_csv(path, ("id", "x"))
    assert str(path) in refused(error, ValueError)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,url\n1,2\n")
    with pytest.raises(ValueError) as error:
        tables.read_csv(path, ("id", "landmark_id"))
    message = refused(error, ValueError)
    assert message == f"{path}: no column landmark_id; it has id, url"


# The category join


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://commons.wikimedia.org/wiki/Category:Pont_Neuf", "Pont Neuf"),
        ("http://commons.wikimedia.org/wiki/Category:Pont%20Neuf", "Pont Neuf"),
        ("https://commons.wikimedia.org/wiki/Category:%C3%85re", "Åre"),
        ("http://commons.wikimedia.org/wiki/Category:Åre", "Åre"),
        (
            "http://commons.wikimedia.org/wiki/Category:Ch%C3%A2teau_d%27If",
            "Château d'If",
        ),
        (
            "http://commons.wikimedia.org/wiki/Category:Kyrka,_Sm%c3%a5land",
            "Kyrka, Småland",
        ),
        ("http://commons.wikimedia.org/wiki/Category:100%25_A%2BB+C", "100% A+B+C"),
        ("http://commons.wikimedia.org/wiki/Category:a/b?c=d:e", "a/b?c=d:e"),
    ],
)
def test_a_category_is_its_decoded_name(address, name):
    assert sources.category_name(address) == name


def test_index_images_join_train_by_category_and_not_by_landmark_number(gldv2):
    facts = sources.official(gldv2)
    assert labels_of(facts.index) == {
        "bbbb000000000001": 0,  # percent-encoded and quoted for its comma in train
        "bbbb000000000002": 1,
        "0000000000099999": 2,  # of two landmarks of that name the first in the file
        "bbbb000000000004": -1,  # a name that train does not have
        "bbbb000000000005": -1,  # no place
        "bbbb000000000006": 4,  # a place called NA
        "bbbb000000000007": -1,  # a landmark of which train has no image
        "bbbb000000000008": -1,  # a place without a name
        "99999999e9999999": 0,
        "bbbb000000000009": 6,
    }
    landmarks = facts.index["landmark_id"].tolist()
    assert landmarks == ["10", "30", "5", "7", "-1", "8", "9", "11", "10", "12"]
    assert facts.notes["train landmarks whose category another one has"] == 1


def test_clean_landmarks_come_first_and_the_others_as_they_appear(gldv2):
    facts = sources.official(gldv2)
    number = dict(zip(facts.train["landmark_id"], facts.train["label"], strict=True))
    labels = {"30": 0, "10": 1, "0020": 2, "99": 3, "None": 4, "1e5": 5, "20": 6}
    assert number == labels
    assert facts.clean["label"].tolist() == [0, 0, 0, 1, 2]
    trusted = facts.train["clean"].tolist()
    assert trusted == [0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert facts.sources == {
        "train/train.csv": 11,
        "train/train_clean.csv": 3,
        "train/train_label_to_category.csv": 7,
        "index/index.csv": 10,
        "index/index_image_to_landmark.csv": 9,
        "index/index_label_to_category.csv": 7,
        "test/test.csv": 6,
        "test/retrieval_solution_v2.1.csv": 7,
    }


def test_a_missing_split_gives_empty_tables(gldv2):
    whole = sources.official(gldv2)
    for split in ("test", "index", "train"):
        (gldv2 / split).rename(gldv2 / f"no_{split}")
        if split == "train":
            (gldv2 / "no_index").rename(gldv2 / "index")
        facts = sources.official(gldv2)
        assert len(facts.query) == len(facts.solution) == 0
        if split == "train":
            assert len(facts.train) == len(facts.clean) == len(facts.country) == 0
            assert set(facts.index["label"]) == {-1}
        else:
            assert facts.train.equals(whole.train)
            assert len(facts.index) == (len(whole.index) if split == "test" else 0)


# Countries and continents


def test_countries_go_by_landmark_id_and_the_last_file_wins(gldv2):
    facts = sources.official(gldv2)
    expected = ["FR", "GB", "FR", "NA", "NA", "OTHER", "OTHER"]
    assert facts.country.tolist() == expected
    assert facts.notes["landmarks in more than one country file"] == 1
    assert facts.notes["landmarks in no country file"] == 2


def test_a_landmark_twice_in_one_country_file_is_not_in_two_countries(gldv2):
    path = gldv2 / "train/country/GB.json"
    path.write_text('[{"id": 10}, {"id": 10}, {"id": "99"}]')
    facts = sources.official(gldv2)
    assert facts.country[3] == "NA"  # after GB
    assert facts.notes["landmarks in more than one country file"] == 2


def test_without_country_files_every_landmark_is_elsewhere(gldv2):
    (gldv2 / "train/country").rename(gldv2 / "country")
    facts = sources.official(gldv2)
    assert facts.country.tolist() == ["OTHER"] * 7
    assert facts.notes["landmarks in no country file"] == 7


@pytest.mark.parametrize(
    "text", ["", "{}x", '{"id": 3}', "[3]", '[{"name": "a"}]', "null"]
)
def test_a_country_file_of_another_form_is_refused(gldv2, text):
    path = gldv2 / "train/country/FR.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    assert str(path) in refused(error, ValueError)


def test_the_continent_table_has_one_row_a_country(continents):
    with continents.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    codes = [row["country"] for row in rows]
    assert len(codes) == len(set(codes)) == 249 + 2  # ISO 3166, Kosovo, OTHER
    assert all(len(code) == 2 and code.isupper() for code in codes if code != "OTHER")
    assert all(row["name"] for row in rows)
    for column in ("continent", "glr2021"):
        assert {row[column] for row in rows} == PLACES
        continent = {row["country"]: row[column] for row in rows}
        assert tables.read_continents(continents, column) == continent
        assert continent["NA"] == "Africa"
        assert continent["XK"] == "Europe"
        assert continent["OTHER"] == "OTHER"
        somewhere = {
            "SE": "Europe",
            "JP": "Asia",
            "EG": "Africa",
            "US": "North America",
        }
        somewhere |= {"BR": "South America", "AU": "Oceania", "AQ": "Antarctica"}
        assert somewhere.items() <= continent.items()
    assert [row["country"] for row in rows if row["continent"] == "OTHER"] == ["OTHER"]


def test_countries_on_two_continents_are_decided(continents):
    ours = tables.read_continents(continents)
    theirs = tables.read_continents(continents, "glr2021")
    # the last row of the table that the 2021 system used
    assert {code: theirs[code] for code in BOTH} == dict.fromkeys(BOTH, "Asia")
    assert theirs["UM"] == "North America"
    assert ours["RU"] == "Europe"
    others = set(BOTH) - {"RU"}
    assert {code: ours[code] for code in others} == dict.fromkeys(others, "Asia")
    assert ours["UM"] == "Oceania"
    differ = {code for code in ours if ours[code] != theirs[code]}
    assert differ == {"RU", "UM"}


def test_an_unknown_column_of_continents_is_refused(continents, tmp_path):
    with pytest.raises(ValueError, match="no column glr2019"):
        tables.read_continents(continents, "glr2019")
    with pytest.raises(FileNotFoundError, match="no such file"):
        tables.read_continents(tmp_path / "continents.csv")


# The solution


def test_ignored_queries_have_no_answers(gldv2):
    solution = tables.read_solution(gldv2 / "test/retrieval_solution_v2.1.csv")
    assert solution.columns.tolist() == ["id", "images", "usage"]
    assert solution["images"].tolist()[0] == solution["images"].tolist()[-1] == ""
    assert solution["id"][3] == "0000000000054321"
    assert solution["images"][3] == "bbbb000000000006"


def test_columns_of_the_solution_go_by_name(tmp_path):
    path = tmp_path / "solution.csv"
    path.write_text("Usage,note,id,images\nPublic,x,0000000000000001,a b\n")
    solution = tables.read_solution(path)
    assert solution.columns.tolist() == ["id", "images", "usage"]
    assert solution.to_numpy().tolist() == [["0000000000000001", "a b", "Public"]]


def test_a_usage_that_does_not_exist_is_refused(gldv2):
    path = gldv2 / "test/retrieval_solution_v2.1.csv"
    replace_in(path, ",Public", ",public")
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    assert f"{path}: Usage 'public'" in refused(error, ValueError)


# Refusals of a GLDv2 folder

OFFICIAL = {
    "train/train.csv": ("id", "landmark_id"),
    "train/train_clean.csv": ("landmark_id", "images"),
    "train/train_label_to_category.csv": ("landmark_id", "category"),
    "index/index.csv": ("id",),
    "index/index_image_to_landmark.csv": ("id", "landmark_id"),
    "index/index_label_to_category.csv": ("landmark_id", "category"),
    "test/test.csv": ("id",),
}
SOLUTION = {"test/retrieval_solution_v2.1.csv": ("id", "images", "Usage")}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_missing_csv_is_refused(gldv2, name):
    (gldv2 / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        sources.official(gldv2)
    assert refused(error, FileNotFoundError) == f"{gldv2 / name}: no such file"


@pytest.mark.parametrize(
    ("name", "column"),
    [(name, column) for name, all_ in (OFFICIAL | SOLUTION).items() for column in all_],
)
def test_a_missing_column_is_refused(gldv2, name, column):
    replace_in(gldv2 / name, column, "strange")  # the header is the first line
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    message = refused(error, ValueError)
    assert message.startswith(f"{gldv2 / name}: no column {column}; it has ")
    assert "strange" in message


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_csv_without_rows_is_refused(gldv2, name):
    header = (gldv2 / name).read_text(encoding="utf-8").splitlines()[0]
    (gldv2 / name).write_text(header + "\n")
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    assert refused(error, ValueError) == f"{gldv2 / name}: no rows"


@pytest.mark.parametrize(
    "bad", ["AAAA00000000FFFF", "aaaa00000000001", "../../../passwd0", "None", "aaé"]
)
@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("train/train.csv", "aaaa000000000003"),
        ("train/train_clean.csv", "0000000000012345"),
        ("index/index.csv", "bbbb000000000004"),
        ("test/test.csv", "cccc000000000003"),
    ],
)
def test_an_id_that_is_not_sixteen_hex_digits_is_refused(gldv2, name, good, bad):
    replace_in(gldv2 / name, good, bad)
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    message = refused(error, ValueError)
    assert message == f"{gldv2 / name}: {bad!r} is not an id of 16 hex digits"


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        (
            "train/train.csv",
            "aaaa000000000003,",
            "aaaa000000000004,",
            "aaaa000000000004",
        ),
        ("train/train_clean.csv", "\n10,", "\n30,", "30"),
        (
            "train/train_clean.csv",
            "10,1234",
            "10,0000000000012345 1234",
            "0000000000012345",
        ),
        ("train/train_clean.csv", "30,", "30,0000000000012345 ", "0000000000012345"),
        ("index/index.csv", "bbbb000000000005", "bbbb000000000004", "bbbb000000000004"),
        (
            "index/index_image_to_landmark.csv",
            "bbbb000000000002",
            "bbbb000000000001",
            None,
        ),
        ("test/test.csv", "cccc000000000003", "cccc000000000004", "cccc000000000004"),
        (
            "test/retrieval_solution_v2.1.csv",
            "cccc000000000005",
            "cccc000000000004",
            None,
        ),
    ],
    ids=[
        "image of train",
        "clean landmark",
        "clean image of two landmarks",
        "clean image twice in one landmark",
        "image of index",
        "place of an index image",
        "query",
        "answer",
    ],
)
def test_an_id_that_stands_twice_is_refused(gldv2, name, old, new, what):
    replace_in(gldv2 / name, old, new)
    with pytest.raises(ValueError) as error:
        sources.official(gldv2)
    message = refused(error, ValueError)
    assert message == f"{gldv2 / name}: {what or new} stands there more than once"


def test_a_folder_that_is_not_gldv2_is_refused(gldv2):
    with pytest.raises(FileNotFoundError) as error:
        sources.official(gldv2.parent)
    message = refused(error, FileNotFoundError)
    assert message.startswith(f"{gldv2.parent}: no train/, index/ or test/ folder")


@pytest.mark.parametrize("split", ["train", "index", "test"])
def test_a_folder_without_the_images_of_a_split_is_refused(gldv2, split):
    for path in (gldv2 / split).rglob("*.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        sources.official(gldv2)
    assert f"{gldv2}: {split}/" in refused(error, FileNotFoundError)


def test_a_single_image_that_is_missing_is_not_refused(gldv2):
    assert not (gldv2 / "train/a/a/a/aaaa000000000004.jpg").exists()
    assert "aaaa000000000004" in sources.official(gldv2).train["id"].tolist()


def test_an_unknown_layout_is_refused(gldv2):
    with pytest.raises(ValueError) as error:
        sources.read(gldv2, "gldv3")
    message = refused(error, ValueError)
    assert message == "layout 'gldv3' is not one of gldv2, csv, folders"


# A CSV of one's own


@pytest.fixture
def shop(tmp_path):
    """A folder of pictures and a writer of its table."""
    root = tmp_path / "shop"
    root.mkdir()
    for number in range(20):
        Image.new("RGB", (10 + number, 12)).save(root / f"{number}.jpg")

    def write(text, name="table.csv"):
        (root / name).write_text(text, encoding="utf-8")
        return root / name

    return write


TABLE = """\
path,label,group,split
0.jpg,tea,NA,train
1.jpg,007,GB,train
2.jpg,tea,FR,train
3.jpg,None,GB,train
4.jpg,tea,,index
5.jpg,,,index
6.jpg,007,,index
7.jpg,salt,,index
8.jpg,tea,,index
9.jpg,tea,,query
10.jpg,salt,,query
11.jpg,pepper,,query
12.jpg,007,,query
13.jpg,None,,query
"""


def test_facts_of_a_table_worked_by_hand(shop):
    path = shop(TABLE)
    facts = sources.from_csv(path, path.parent)
    assert facts.train["path"].tolist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert facts.train["label"].tolist() == [0, 1, 0, 2]  # as they appear
    assert facts.train["landmark_id"].tolist() == ["tea", "007", "tea", "None"]
    assert facts.train["clean"].tolist() == [1] * 4
    assert facts.clean["path"].tolist() == ["0.jpg", "2.jpg", "1.jpg", "3.jpg"]
    assert facts.clean["label"].tolist() == [0, 0, 1, 2]
    assert facts.country.tolist() == ["NA", "GB", "GB"]  # of a label's first image
    assert facts.index["label"].tolist() == [0, -1, 1, -1, 0]
    assert facts.index["landmark_id"].tolist() == ["tea", "-1", "007", "salt", "tea"]
    ids = [hashlib.sha256(f"{n}.jpg".encode()).hexdigest()[:16] for n in range(14)]
    for table, first in ((facts.train, 0), (facts.index, 4), (facts.query, 9)):
        assert table["id"].tolist() == ids[first : first + len(table)]
    assert facts.solution["id"].tolist() == ids[9:]
    answers = [f"{ids[4]} {ids[8]}", ids[7], "", ids[6], ""]
    assert facts.solution["images"].tolist() == answers
    usage = ["Public", "Private", "Ignored", "Public", "Ignored"]
    assert facts.solution["usage"].tolist() == usage
    read = {"table.csv (train)": 4, "table.csv (index)": 5, "table.csv (query)": 5}
    assert facts.sources == read


def test_a_table_becomes_lists_that_keep_validation_apart(shop, tmp_path):
    path = shop(TABLE)
    facts = sources.read(path.parent, "csv", path)
    counts = lists.build(facts, path.parent, tmp_path / "lists")
    expected = {"clean": 4, "c2x": 4, "full": 4, "index": 5, "query": 5}
    expected |= {"index_train": 7, "index_train_holdout": 4}
    # tea and 007 have a label that train knows, salt has not; two are ignored
    assert counts == expected | {"all": 7 + 2 + 2, "all_holdout": 4 + 2}
    full = lists.load(tmp_path / "lists", "full")
    assert full.rows["landmark_id"].tolist() == ["tea", "007", "tea", "None"]
    assert full.rows["country"].tolist() == ["NA", "GB", "NA", "GB"]
    assert full.rows["width"].tolist() == [10, 11, 12, 13]
    searched = lists.load(tmp_path / "lists", "index")
    held = lists.load(tmp_path / "lists", "all_holdout")
    assert lists.leaks({held.hash: "all_holdout"}, tmp_path / "lists", searched) == {}


def test_a_query_without_a_label_has_no_answers(shop):
    path = shop(TABLE + "14.jpg,,,query\n15.jpg,,,index\n")
    solution = sources.from_csv(path, path.parent).solution
    assert solution["images"].tolist()[-1] == ""  # distractors are nobody's answer
    assert solution["usage"].tolist()[-1] == "Ignored"


def test_a_table_of_two_columns_is_all_train(shop):
    path = shop("label,path\n007,0.jpg\n7,1.jpg\nNA,2.jpg\n")
    facts = sources.from_csv(path, path.parent)
    assert facts.train["landmark_id"].tolist() == ["007", "7", "NA"]
    assert facts.train["label"].tolist() == [0, 1, 2]
    assert facts.country.tolist() == ["OTHER"] * 3
    assert len(facts.index) == len(facts.query) == len(facts.solution) == 0


def test_ids_depend_on_the_path_alone(shop):
    path = shop("path,label\n3.jpg,a\n4.jpg,b\n")
    some = sources.from_csv(path, path.parent)
    path = shop("path,label,split\n4.jpg,z,index\n5.jpg,c,train\n3.jpg,a,query\n")
    others = sources.from_csv(path, path.parent)
    assert others.index["id"][0] == some.train["id"][1]
    assert others.query["id"][0] == some.train["id"][0]
    assert all(sources.ID.fullmatch(name) for name in some.train["id"])


def test_a_table_saved_by_a_spreadsheet_is_read(shop):
    path = shop("\ufeffpath,label\r\n0.jpg,a\r\n1.jpg,b\r\n")
    facts = sources.from_csv(path, path.parent)
    assert facts.train["path"].tolist() == ["0.jpg", "1.jpg"]
    assert facts.train["landmark_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("path\n0.jpg\n", ValueError, "no column label"),
        ("path,label\n", ValueError, "no rows"),
        (
            "path,label\n0.jpg,a\n0.jpg,b\n",
            ValueError,
            "0.jpg stands there more than once",
        ),
        (
            "path,label,split\n0.jpg,a,val\n",
            ValueError,
            "split 'val' is not one of train",
        ),
        (
            "path,label\n0.jpg,a\n1.jpg,\n",
            ValueError,
            "line 3 is of train without a label",
        ),
        (
            "path,label\na/0.jpg,a\na/1.jpg,b\n",
            FileNotFoundError,
            "a/0.jpg is not there",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(shop, text, kind, words):
    path = shop(text)
    with pytest.raises(kind) as error:
        sources.from_csv(path, path.parent)
    message = refused(error, kind)
    assert words in message
    assert str(path.parent) in message


def test_a_table_that_is_not_there_is_refused(shop):
    path = shop("path,label\n")
    with pytest.raises(FileNotFoundError, match="none.csv: no such file"):
        sources.read(path.parent, "csv", path.with_name("none.csv"))


# A folder per class


@pytest.fixture
def classes(tmp_path):
    """Draws empty pictures at the given paths of a folder."""
    root = tmp_path / "classes"
    root.mkdir()

    def draw(*names):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        return root

    return draw


def in_split(table):
    return table["path"].tolist()


def test_every_third_class_is_held_out_of_a_folder_per_class(classes):
    names = [f"{c}/{n}.jpg" for c in "abcdefg" for n in range(9)]
    facts = sources.from_folders(classes(*names, "a/notes.txt", "f/deep/er/9.PNG"))
    assert in_split(facts.train) == [name for name in names if name[0] in "abdeg"]
    assert facts.train["label"].tolist() == [n for n in range(5) for _ in range(9)]
    assert facts.train["landmark_id"].tolist()[::9] == list("abdeg")
    assert in_split(facts.query) == ["c/0.jpg", "c/1.jpg", "f/0.jpg", "f/1.jpg"]
    searched = [f"{c}/{n}.jpg" for c in "cf" for n in range(2, 9)] + ["f/deep/er/9.PNG"]
    assert in_split(facts.index) == searched
    assert set(facts.index["label"]) == {-1}  # train does not know them
    answers = facts.solution["images"].str.split().map(len).tolist()
    assert answers == [7, 7, 8, 8]
    by_id = dict(zip(facts.index["id"], facts.index["path"], strict=True))
    for number, row in facts.solution.iterrows():
        first = in_split(facts.query)[number][0]
        assert {by_id[name][0] for name in row["images"].split()} == {first}


@pytest.mark.parametrize(("held_out", "queries"), [(0, 0), (1, 4), (2, 2), (9, 0)])
def test_as_many_classes_are_held_out_as_asked_for(classes, held_out, queries):
    root = classes(*[f"{c}/{n}.webp" for c in "abcd" for n in range(5)])
    facts = sources.from_folders(root, held_out)
    assert len(facts.query) == queries
    assert len(facts.train) == 20 - 5 * queries
    assert len(facts.index) == 4 * queries


def test_a_single_picture_of_a_held_out_class_is_an_ignored_query(classes):
    facts = sources.from_folders(classes("a/0.jpg", "b/0.jpg", "c/0.jpg"))
    assert in_split(facts.query) == ["c/0.jpg"]
    assert facts.solution["usage"].tolist() == ["Ignored"]


def test_folders_that_are_split_up_stay_so(classes):
    facts = sources.read(
        classes(
            "train/b/0.jpg",
            "train/a/0.jpeg",
            "index/a/1.png",
            "index/z/0.bmp",
            "query/a/2.jpg",
            "query/z/3.jpg",
        ),
        "folders",
    )
    assert in_split(facts.train) == ["train/a/0.jpeg", "train/b/0.jpg"]
    assert in_split(facts.index) == ["index/a/1.png", "index/z/0.bmp"]
    assert facts.index["label"].tolist() == [0, -1]
    assert in_split(facts.query) == ["query/a/2.jpg", "query/z/3.jpg"]
    assert facts.solution["images"].tolist() == facts.index["id"].tolist()


def test_a_folder_without_pictures_is_refused(classes):
    with pytest.raises(FileNotFoundError) as error:
        sources.from_folders(classes("a/readme.txt", "0.jpg"))
    message = refused(error, FileNotFoundError)
    assert message.endswith("classes: no folder with images in it")
    with pytest.raises(FileNotFoundError):
        sources.from_folders(classes().parent / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        *("a/._0.jpg", "__MACOSX/a/._0.jpg", "__MACOSX/0.jpg", "@eaDir/a/0.jpg"),
        *(
            "a/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
            "a/.thumbnails/0.png",
            ".Trash-0/1.jpg",
        ),
        *(
            "a/.@__thumb/s.jpg",
            "#recycle/0.jpg",
            "a/Thumbs.db",
            "a/.DS_Store",
            "a/DESKTOP.INI",
        ),
        *("$RECYCLE.BIN/x/0.jpg", "lost+found/0.jpg", "@Recycle/0.jpg", "a/~$0.jpg"),
        *("a/@SynoEAStream/0.jpg", "Network Trash Folder/0.jpg", "FOUND.000/0.jpg"),
    ],
)
def test_what_systems_leave_beside_photographs_must_be_none(classes, name):
    plain = [f"{c}/{n}.jpg" for c in "abc" for n in range(4)]
    before = sources.from_folders(classes(*plain))
    after = sources.from_folders(classes(name))
    for split in ("train", "index", "query"):
        assert in_split(getattr(after, split)) == in_split(getattr(before, split))
    if "/" in name and name[0] == "a":
        assert after.notes["left out: hidden, or left by a system"] == 1


@pytest.mark.parametrize(
    "suffix",
    [
        "jpg",
        "JPG",
        "jpeg",
        "jpe",
        "jfif",
        "mpo",
        "png",
        "PNG",
        "webp",
        "bmp",
        "dib",
        "tif",
        "TIFF",
        "jp2",
        "avif",
        "gif",
        "ppm",
        "pgm",
    ],
)
def test_every_extension_that_the_decoder_reads_must_count(classes, suffix):
    names = [f"{c}/{n}.{suffix}" for c in "abc" for n in range(4)]
    facts = sources.from_folders(classes(*names))
    assert len(facts.train) + len(facts.index) + len(facts.query) == 12
    assert facts.notes == {}


def test_what_the_decoder_does_not_read_must_be_counted_by_extension(classes):
    plain = [f"{c}/{n}.jpg" for c in "abc" for n in range(4)]
    odd = ["a/x.HEIC", "b/y.heic", "b/z.cr2", "c/notes", "d/1.heic", "9.jpg"]
    facts = sources.from_folders(classes(*plain, *odd))
    assert len(facts.train) + len(facts.index) + len(facts.query) == 12
    assert facts.notes == {
        "left out: .heic, which the decoder does not read": 3,
        "left out: .cr2, which the decoder does not read": 1,
        "left out: no extension, which the decoder does not read": 1,
        "left out: class without a photograph": 1,
        "left out: photograph in no class folder": 1,
    }


def test_what_is_no_plain_file_must_be_left_out_and_counted(classes, tmp_path):
    root = classes(*[f"{c}/{n}.jpg" for c in "abc" for n in range(4)])
    os.mkfifo(root / "a/9.jpg")  # reading it would wait for ever
    (root / "b/8.jpg").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.jpg").touch()
    (root / "a/more").symlink_to(tmp_path / "elsewhere")
    facts = sources.from_folders(root)
    assert len(facts.train) + len(facts.index) + len(facts.query) == 12
    assert facts.notes == {
        "left out: no plain file": 1,
        "left out: folder behind a link, inside a class": 1,
    }


def test_folders_beside_the_splits_must_be_counted(classes):
    root = classes("train/a/0.jpg", "index/a/1.jpg", "query/a/2.jpg", "extra/a/3.jpg")
    assert sources.from_folders(root).notes == {"left out: folder beside the splits": 1}


@pytest.mark.parametrize("name", ["Train", "INDEX", "query ", "Query"])
def test_a_split_in_another_spelling_must_be_asked_about(classes, name):
    root = classes(f"{name}/a/0.jpg", "b/0.jpg", "c/0.jpg")
    with pytest.raises(ValueError, match=repr(name)) as error:
        sources.from_folders(root)
    refused(error, ValueError)


@pytest.mark.parametrize("mark", ["\r", "\n", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
def test_a_name_that_no_list_can_hold_must_be_refused(classes, mark):
    with pytest.raises(ValueError, match="rename") as error:
        sources.from_folders(classes(f"a{mark}/0.jpg", "b/0.jpg", "c/0.jpg"))
    refused(error, ValueError)


def test_a_name_that_is_not_utf_8_must_be_shown(classes):
    root = classes("a/0.jpg", "b/0.jpg", "c/0.jpg")
    (root / "a" / os.fsdecode(b"caf\xe9.jpg")).touch()
    with pytest.raises(ValueError, match=r"caf.xe9") as error:
        sources.from_folders(root)
    refused(error, ValueError)


# Tables of one data set that do not fit each other


@pytest.mark.parametrize("landmark", ["10.0", "10.", " 10", "10 "])
@pytest.mark.parametrize(
    "name",
    ["train/train.csv", "train/train_clean.csv", "train/train_label_to_category.csv"],
)
def test_a_landmark_must_not_be_another_one_for_its_spelling(gldv2, name, landmark):
    path = gldv2 / name
    head, *rows = path.read_text().splitlines()
    at = head.split(",").index("landmark_id")
    cells = rows[0].split(",", at + 1)
    cells[at] = landmark
    path.write_text("\n".join([head, ",".join(cells), *rows[1:]]) + "\n")
    with pytest.raises(ValueError, match=repr(landmark)) as error:
        sources.official(gldv2)
    assert name in refused(error, ValueError)


def test_clean_images_that_train_lacks_must_be_left_out_and_counted(gldv2):
    whole = sources.official(gldv2)
    path = gldv2 / "train/train.csv"
    head, *rows = path.read_text().splitlines()
    lost = whole.clean["id"].iloc[-1]
    path.write_text("\n".join([head, *(r for r in rows if lost not in r)]) + "\n")
    facts = sources.official(gldv2)
    assert facts.clean["id"].tolist() == whole.clean["id"].tolist()[:-1]
    assert facts.lost["clean"] == {sources.NOT_IN_TRAIN: 1}


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("", "no path"),
        ("  ", "no path"),
        ("a", "folder"),
        ("a/b", "folder"),
        ("a\\b\\0.jpg", "backslash"),
        ("C:/photos/0.jpg", "absolute"),
        ("/elsewhere/0.jpg", "absolute"),
    ],
)
def test_a_path_that_can_be_no_image_must_be_refused(shop, path, word):
    table = shop(f"path,label\na/b/0.jpg,x\n{path},y\n")
    with pytest.raises(ValueError, match=f"line 3.*{word}") as error:
        sources.from_csv(table, table.parent)
    refused(error, ValueError)


def test_an_absolute_path_inside_the_data_must_be_the_relative_one(shop):
    table = shop("path,label\na/0.jpg,x\n")
    (table.parent / "a").mkdir(exist_ok=True)
    (table.parent / "a/0.jpg").touch()
    plain = sources.from_csv(table, table.parent).train
    table.write_text(f"path,label\n{table.parent}/a/0.jpg,x\n")
    assert sources.from_csv(table, table.parent).train.equals(plain)


@pytest.mark.parametrize("there", [[5, 150], [150], [*range(101, 160)]])
def test_a_part_of_the_images_must_be_taken(shop, there):
    table = shop("path,label\n" + "".join(f"a/{n}.jpg,x\n" for n in range(160)))
    (table.parent / "a").mkdir(exist_ok=True)
    for number in there:
        (table.parent / f"a/{number}.jpg").touch()
    assert len(sources.from_csv(table, table.parent).train) == 160


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"\xff\xfe", "UTF-16"),
        (b"id;x\n", "semicolons"),
        (b"id\tx\n", "tabs"),
        (b"id, x\n", "' x'"),
        (b"id,x,x\n", "column x stands there twice"),
        (b"id,x\n\0,1\n", "NUL"),
    ],
)
def test_what_is_invisible_in_a_header_must_be_named(tmp_path, start, word):
    path = tmp_path / "table.csv"
    path.write_bytes(start + b"1,2\n")
    with pytest.raises(ValueError, match=word) as error:
        tables.read_csv(path, ("id", "x"))
    refused(error, ValueError)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_must_not_depend_on_marks_and_line_ends(tmp_path, mark):
    path = tmp_path / "ids.txt"
    path.write_bytes(mark + b"a\r\n\r\n b \nc")
    assert tables.read_lines(path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "label",
    ["10", "Big Ben", "a%20b", "100 %", "x,y", 'a"b', "a\u3000b", "\u00c9", "%", " "],
)
def test_a_label_must_come_back_from_one_word(label):
    word = tables.encode_label(label)
    assert len(word.split()) == 1 and not set(',"') & set(word)
    assert tables.decode_label(word) == label


def test_country_files_of_the_real_photos_are_read_as_they_are(photos):
    facts = sources.official(photos / "packages")
    expected = {}
    for path in sorted((photos / "packages/train/country").iterdir()):
        for row in json.loads(path.read_text(encoding="utf-8")):
            expected[str(row["id"])] = path.stem
    landmark = facts.train.drop_duplicates("label").set_index("label")["landmark_id"]
    assert len(landmark) == len(facts.country)
    for label, country in enumerate(facts.country):
        assert country == expected.get(landmark[label], "OTHER")
    assert len(np.unique(facts.country.astype(str))) > 3


# A competition's folders


def test_a_competition_is_its_folders_of_images_in_the_order_of_ids(tmp_path):
    names = {"test": ["ab" * 8, "0" * 16], "index": ["12e3456789012345", "f" * 16]}
    for folder, ids in names.items():
        for name in ids:
            path = tmp_path.joinpath(folder, *name[:3], f"{name}.jpg")
            path.parent.mkdir(parents=True)
            path.touch()
    (tmp_path / "test" / "notes.txt").touch()
    facts = sources.competition(tmp_path)
    assert facts.query["id"].tolist() == ["0" * 16, "ab" * 8]
    assert facts.index["path"].tolist() == [
        "index/1/2/e/12e3456789012345.jpg",
        f"index/f/f/f/{'f' * 16}.jpg",
    ]
    assert facts.index["label"].tolist() == [-1, -1]
    assert facts.train.empty and facts.solution.empty
    assert facts.sources == {"test": 2, "index": 2}
    with pytest.raises(FileNotFoundError, match=r"no folder .*queries; there: index, "):
        sources.competition(tmp_path, query="queries")
    (tmp_path / "index" / "1" / "photo.jpg").touch()
    assert sources.competition(tmp_path).sources == {"test": 2, "index": 2}


def test_what_was_read_is_compared_with_all_of_gldv2(gldv2):
    facts = sources.official(gldv2)
    whole = {
        "train": {"images": len(facts.train), "landmarks": len(facts.country)},
        "clean": {"images": len(facts.clean), "landmarks": 0},
        "index": len(facts.index),
        "test": 117_577,
    }
    clean = facts.clean["landmark_id"].nunique()
    told = f"{clean} of 0 clean landmarks, {len(facts.query)} of 117,577 test images"
    assert sources.completeness(facts, whole) == f"not all of GLDv2: {told}"
    whole["clean"]["landmarks"], whole["test"] = clean, len(facts.query)
    assert sources.completeness(facts, whole) == "all of GLDv2"


def test_the_counts_of_all_of_gldv2_are_those_of_its_paper():
    path = Path(sources.__file__).resolve().parents[2] / "datasets_meta" / "gldv2.json"
    whole = json.loads(path.read_text())
    assert whole["train"] == {"images": 4_132_914, "landmarks": 203_094}
    assert whole["clean"] == {"images": 1_580_470, "landmarks": 81_313}
    assert (whole["index"], whole["test"]) == (761_757, 117_577)


# Another clean list, and images that are excluded


@pytest.fixture
def cleaned(tmp_path):
    """A clean list of two landmarks that the official one has in another order, or not at all."""
    path = tmp_path / "cleaned.csv"
    path.write_text(
        "landmark_id,images\n20,aaaa000000000008\n"
        "10,aaaa000000000002 123456789012e345 aaaa000000000005\n"
    )
    return path


def test_another_clean_list_decides_labels_and_what_is_clean(gldv2, cleaned):
    facts = sources.read(gldv2, clean=cleaned)
    assert facts.clean["id"].tolist() == [
        *("aaaa000000000008", "aaaa000000000002"),
        *("123456789012e345", "aaaa000000000005"),
    ]
    assert facts.clean["label"].tolist() == [0, 1, 1, 1]
    label = dict(zip(facts.train["landmark_id"], facts.train["label"], strict=True))
    # the clean ones first, the others in the order in which train names them
    assert label == {"20": 0, "10": 1, "99": 2, "30": 3, "None": 4, "0020": 5, "1e5": 6}
    own = facts.train.set_index("id")["clean"]
    assert own[own == 1].index.tolist() == [
        *("123456789012e345", "aaaa000000000002"),
        *("aaaa000000000005", "aaaa000000000008"),
    ]
    assert facts.country[1] == sources.read(gldv2).country[1]  # 10's, both times
    index = facts.index.set_index("id")["label"]
    assert index["bbbb000000000002"] == 1  # by its name: Château d'If, landmark 10


def test_excluded_images_are_in_no_table_of_train_and_leave_no_hole_in_the_labels(
    gldv2,
):
    whole = sources.read(gldv2)
    excluded = {
        "1234567890123456": "near-duplicate",  # all of landmark 0020
        "aaaa000000000006": "near-duplicate",
        "aaaa000000000008": "landmark of roxford",  # all of landmark 20, not clean
        "bbbb000000000001": "near-duplicate",  # of the index
    }
    facts = sources.read(gldv2, excluded=excluded)
    for name in ("train", "clean"):
        before, after = getattr(whole, name), getattr(facts, name)
        kept = before.loc[~before["id"].isin(excluded), "id"]
        assert after["id"].tolist() == kept.tolist()
        assert after.index.tolist() == list(range(len(after)))
    labels = facts.train["label"]
    assert sorted(labels.unique()) == list(range(len(facts.country)))
    assert len(facts.country) == len(whole.country) - 2
    assert len(facts.index) == len(whole.index)  # it is searched all the same
    assert facts.lost == {
        "full": {"excluded: landmark of roxford": 1, "excluded: near-duplicate": 2},
        "clean": {"excluded: near-duplicate": 2},
    }
    everything = dict.fromkeys(whole.train["id"], "all")
    with pytest.raises(ValueError, match="^every image of train is excluded$"):
        sources.read(gldv2, excluded=everything)


def test_other_layouts_take_a_clean_list_and_exclusions_too(classes, tmp_path):
    root = classes("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg", "c/1.jpg")
    whole = sources.read(root, "folders")
    names = whole.train.set_index("path")["id"]
    path = tmp_path / "cleaned.csv"
    path.write_text(f"landmark_id,images\nb,{names['b/1.jpg']}\na,{names['a/0.jpg']}\n")
    facts = sources.read(
        root, "folders", clean=path, excluded={names["b/0.jpg"]: "near-duplicate"}
    )
    assert facts.clean["path"].tolist() == ["b/1.jpg", "a/0.jpg"]
    assert facts.clean["label"].tolist() == [0, 1]
    rows = facts.train[["path", "label", "clean"]].to_numpy().tolist()
    assert rows == [["a/0.jpg", 1, 1], ["a/1.jpg", 1, 0], ["b/1.jpg", 0, 1]]
    assert facts.lost["full"] == {"excluded: near-duplicate": 1}
    path.write_text(f"landmark_id,images\nb,{'f' * 16}\n")
    with pytest.raises(ValueError, match=f"{'f' * 16} is not an image of train"):
        sources.read(root, "folders", clean=path)


def test_a_clean_list_may_name_a_landmark_of_its_own(gldv2, classes, tmp_path):
    path = tmp_path / "cleaned.csv"
    folders = classes("a/0.jpg", "b/0.jpg")
    for root, layout in ((gldv2, "gldv2"), (folders, "folders")):
        name = sources.read(root, layout).train["id"][0]
        path.write_text(f"landmark_id,images\nnew,{name}\n")
        facts = sources.read(root, layout, clean=path)
        assert facts.clean["label"].tolist() == [0] and facts.country[0] == "OTHER"


def test_a_clean_list_lies_where_the_caller_is(gldv2, cleaned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(sources.read(gldv2, clean=Path(cleaned.name)).clean) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"landmark_id,images\n10,{'f' * 16}\n", "f is not an image of train"),
        ("landmark_id,images\n10,aaaa\n", "'aaaa' is not an id of 16 hex digits"),
        ("landmark_id,images\n10,  \n", "landmark 10 has no images"),
        ("landmark_id,images\n10,\n", "line 2 has no images"),
        ("landmark_id\n10\n", "no column images; it has landmark_id"),
        (f"landmark_id,images\n1,{'a' * 16}\n1,{'b' * 16}\n", "1 stands there more"),
    ],
)
def test_a_clean_list_that_is_none_is_refused(gldv2, tmp_path, text, message):
    path = tmp_path / "cleaned.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        sources.read(gldv2, clean=path)
    assert str(path) in refused(error, ValueError)


def test_tables_can_be_read_before_the_images_are_there(gldv2):
    for picture in gldv2.rglob("*.jpg"):
        picture.unlink()
    with pytest.raises(FileNotFoundError, match="is not there"):
        sources.read(gldv2)
    assert len(sources.read(gldv2, there=False).train) == 11


# Recognition


def test_the_landmarks_that_queries_show_are_read(gldv2):
    assert sources.read(gldv2).recognition.empty
    path = gldv2 / "test/recognition_solution_v2.1.csv"
    path.write_text(
        "id,landmarks,Usage\ncccc000000000001,10 0020,Private\n0000000000054321,,Public\n"
    )
    facts = sources.read(gldv2)
    assert facts.recognition.to_numpy().tolist() == [
        ["cccc000000000001", "10 0020", "Private"],
        ["0000000000054321", "", "Public"],
    ]
    assert list(facts.recognition.columns) == ["id", "landmarks", "usage"]
    assert facts.sources["test/recognition_solution_v2.1.csv"] == 2
    path.write_text("id,landmarks,Usage\ncccc000000000001,10,Secret\n")
    with pytest.raises(ValueError, match="Usage 'Secret' is not Public, Private or"):
        sources.read(gldv2)
    path.write_text("id,landmarks,Usage\na,1,Public\na,1,Public\n")
    with pytest.raises(ValueError, match="a stands there more than once"):
        sources.read(gldv2)


def test_a_query_of_a_place_that_train_does_not_have_shows_no_landmark(classes):
    names = [f"{c}/{n}.jpg" for c in "abcdef" for n in range(4)]
    facts = sources.read(classes(*names), "folders")
    assert facts.recognition["id"].tolist() == facts.query["id"].tolist()
    assert facts.recognition["landmarks"].tolist() == ["", ""]  # c and f are held out
    assert set(facts.recognition["usage"]) == {"Public", "Private"}


FORMS = {
    "jpg": (r"\b([0-9a-f]{16})\b", r"\1.jpg"),
    "path": (r"\b([0-9a-f]{16})\b", r"test/\1"),
    "zeros": (r"(?<=[\n, ])(\d{1,4})(?=[,\n ])", r"0\1"),
}


@pytest.fixture
def recognised(gldv2):
    """With the landmarks that queries show."""
    ids = (gldv2 / "test/test.csv").read_text().split()[1:]
    rows = [f"{name.split(',')[0]},10 30,Public" for name in ids]
    path = gldv2 / "test/recognition_solution_v2.1.csv"
    path.write_text("\n".join(["id,landmarks,Usage", *rows]) + "\n")
    return gldv2


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("train/train_clean.csv", "zeros"),
        ("train/train_label_to_category.csv", "zeros"),
        ("index/index_image_to_landmark.csv", "jpg"),
        ("index/index_label_to_category.csv", "zeros"),
        ("test/retrieval_solution_v2.1.csv", "path"),
        ("test/retrieval_solution_v2.1.csv", "jpg"),
        ("test/recognition_solution_v2.1.csv", "path"),
        ("test/recognition_solution_v2.1.csv", "zeros"),
    ],
)
def test_a_table_that_writes_ids_in_another_form_must_be_refused(
    recognised, name, form
):
    path = recognised / name
    path.write_text(re.sub(*FORMS[form], path.read_text()))
    with pytest.raises(ValueError, match=f"{name}: .* in another form, such as"):
        sources.official(recognised)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("train/train_label_to_category.csv", "landmarks of train.csv"),
        ("index/index_image_to_landmark.csv", "images of index.csv"),
        ("index/index_label_to_category.csv", "landmarks of index_image_to_landmark"),
        ("test/retrieval_solution_v2.1.csv", "queries of test.csv"),
        ("test/recognition_solution_v2.1.csv", "queries of test.csv"),
    ],
)
def test_a_row_that_a_table_lacks_must_be_counted(recognised, name, lacks):
    def lacking():
        notes = sources.official(recognised).notes
        (note,) = (n for n in notes if n.startswith(lacks) and path.name in n)
        return notes[note]

    path = recognised / name
    before, lines = lacking(), path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    assert lacking() == before + 1
    path.write_text(f"{lines[0]}\n")
    with pytest.raises(ValueError, match=f"{name}: no rows"):
        sources.official(recognised)
