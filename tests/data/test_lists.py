import csv
import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile, ImageOps

from kit import checksums
from kit.data import lists, sources, tables

EVERY = [
    "clean",
    "c2x",
    "full",
    "index",
    "query",
    "index_train",
    "index_train_holdout",
    "all",
    "all_holdout",
]


def raw(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def facts_of(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def category(address):
    """Wikimedia's address of a category -> its name, decoded byte by byte."""
    name = address.split("/wiki/Category:")[1].encode()
    name = re.sub(rb"%([0-9A-Fa-f]{2})", lambda code: bytes([int(code[1], 16)]), name)
    return name.decode().replace("_", " ")


def picture(split, name):
    return f"{split}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def definition(data, searched=None):
    """The lists by section 2.1 of the 2021 system, record by record: rows and country of a label.

    A row is id, path, landmark_id, label, clean. searched: ids of the index that validation
    searches; None is all of it.
    """
    label, trusted, clean, full = {}, {}, [], []
    for line in raw(data / "train/train_clean.csv"):
        landmark = line["landmark_id"]
        label[landmark] = len(label)
        trusted[landmark] = line["images"].split(" ")
        for name in trusted[landmark]:
            clean.append((name, picture("train", name), landmark, label[landmark], 1))
    for line in raw(data / "train/train.csv"):
        name, landmark = line["id"], line["landmark_id"]
        if landmark not in label:
            label[landmark] = len(label)
        good = 1 if name in trusted.get(landmark, []) else 0
        full.append((name, picture("train", name), landmark, label[landmark], good))
    c2x = [row for row in full if row[2] in trusted]

    by_name = {}
    for line in raw(data / "train/train_label_to_category.csv"):
        name = category(line["category"])
        if line["landmark_id"] in label and name not in by_name:
            by_name[name] = label[line["landmark_id"]]
    name_of = {
        line["landmark_id"]: category(line["category"])
        for line in raw(data / "index/index_label_to_category.csv")
    }
    landmark_of = {
        line["id"]: line["landmark_id"]
        for line in raw(data / "index/index_image_to_landmark.csv")
    }
    index, known = [], []
    for line in raw(data / "index/index.csv"):
        name = line["id"]
        landmark = landmark_of.get(name, "-1")
        number = by_name.get(name_of.get(landmark), -1)
        row = (name, picture("index", name), landmark, number, int(number >= 0))
        index.append(row)
        if number >= 0:
            known.append(row)
    label_of = {row[0]: row[3] for row in index}
    if searched is None:
        searched = set(label_of)

    queries = [line["id"] for line in raw(data / "test/test.csv")]
    tested, ignored = [], []
    for line in raw(data / "test/retrieval_solution_v2.1.csv"):
        name = line["id"]
        if name not in queries:
            continue
        if line["Usage"] == "Ignored":
            ignored.append((name, picture("test", name), "-1", -1, 1))
            tested.append(ignored[-1])
            continue
        numbers = []
        for positive in line["images"].split(" "):
            number = label_of.get(positive, -1)
            if number >= 0 and number not in numbers:
                numbers.append(number)
        tested += [(name, picture("test", name), "-1", n, 1) for n in numbers]

    rows = {
        "clean": clean,
        "c2x": c2x,
        "full": full,
        "index": index,
        "query": [(name, picture("test", name), "-1", -1, 0) for name in queries],
        "index_train": full + known,
        "index_train_holdout": full + [row for row in known if row[0] not in searched],
        "all": full + known + tested,
    }
    rows["all_holdout"] = rows["index_train_holdout"] + ignored
    country = dict.fromkeys(label, "OTHER")
    for path in sorted((data / "train/country").iterdir()):
        for place in json.loads(path.read_text(encoding="utf-8")):
            if str(place["id"]) in country:
                country[str(place["id"])] = path.name.removesuffix(".json")
    return rows, {number: country[landmark] for landmark, number in label.items()}


def positives(data):
    """Ids of the queries that count and of their answers."""
    rows = raw(data / "test/retrieval_solution_v2.1.csv")
    rows = [row for row in rows if row["Usage"] != "Ignored"]
    return {row["id"] for row in rows}, {
        name for row in rows for name in row["images"].split()
    }


def written(path):
    """What a list says, in the form of `definition`."""
    return [
        (
            row["id"],
            row["path"],
            row["landmark_id"],
            int(row["label"]),
            int(row["clean"]),
        )
        for row in raw(path)
    ]


@pytest.fixture(params=["gldv2", "packages"])
def data(request):
    """The folder written by hand, then the real photos."""
    if request.param == "gldv2":
        return request.getfixturevalue("gldv2")
    return request.getfixturevalue("photos") / "packages"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "work" / "lists"


@pytest.fixture
def world(continents):
    return tables.read_continents(continents)


@pytest.fixture
def ids(tmp_path):
    """Writes an id list and returns its path."""

    def write(*names, header=True):
        path = tmp_path / "index_ids.csv"
        path.write_text("\n".join((["id"] if header else []) + list(names)) + "\n")
        return path

    return write


def build(data, out, world=None, **options):
    options = {"sizes": False} | options
    return lists.build(sources.official(data), data, out, world, **options)


# Rows, labels and order


def test_lists_match_their_definition(data, out):
    counts = build(data, out)
    expected, _ = definition(data)
    assert sorted(counts) == sorted(expected) == sorted(EVERY)
    for name in set(EVERY) - {"all"}:
        assert written(out / f"{name}.csv") == expected[name], name
    # the images of `all`, leaving open where the ignored ones stand among the tested
    in_front = sorted(expected["all"], key=lambda row: row[3] < 0)
    assert sorted(written(out / "all.csv"), key=lambda row: row[3] < 0) == in_front
    assert counts == {name: len(rows) for name, rows in expected.items()}


def test_all_ends_with_the_test_images_in_the_order_of_the_solution(gldv2, out):
    build(gldv2, out)
    assert written(out / "all.csv") == definition(gldv2)[0]["all"]


def test_lists_of_the_small_folder_worked_by_hand(gldv2, out):
    build(gldv2, out)
    labels = {
        name: [(row[0][-2:], row[3], row[4]) for row in written(out / f"{name}.csv")]
        for name in ("clean", "full", "index", "all")
    }
    assert labels["clean"] == [
        ("06", 0, 1),
        ("45", 0, 1),
        ("05", 0, 1),
        ("45", 1, 1),
        ("56", 2, 1),
    ]
    assert labels["full"] == [
        ("01", 3, 0),
        ("45", 0, 1),
        ("45", 1, 1),
        ("02", 1, 0),
        ("03", 4, 0),
        ("56", 2, 1),
        ("04", 3, 0),
        ("05", 1, 0),  # the clean list has it under another landmark
        ("06", 0, 1),
        ("07", 5, 0),
        ("08", 6, 0),
    ]
    assert [row[1] for row in labels["index"]] == [0, 1, 2, -1, -1, 4, -1, -1, 0, 6]
    tested = [row[:2] for row in labels["all"][11 + 6 :]]
    assert sorted(tested) == [
        ("01", 0),
        ("01", 1),
        ("01", 2),
        ("04", -1),
        ("05", -1),
        ("06", 0),
        ("21", 4),
    ]


def test_holdout_lists_match_their_definition_when_the_index_is_smaller(data, out, ids):
    names = [line["id"] for line in raw(data / "index/index.csv")]
    given = names[1::3]
    counts = build(data, out, index_ids=ids(*given))
    searched = set(given) | positives(data)[1]
    expected, _ = definition(data, searched)
    expected["index_val"] = [row for row in expected["index"] if row[0] in searched]
    assert sorted(counts) == sorted([*EVERY, "index_val"])
    for name in set(counts) - {"all"}:
        assert written(out / f"{name}.csv") == expected[name], name
    assert counts["index_train_holdout"] < counts["index_train"]


def test_countries_and_continents_follow_the_label(data, out, continents):
    world = {line["country"]: line["glr2021"] for line in raw(continents)}
    build(data, out, tables.read_continents(continents, "glr2021"))
    _, country = definition(data)
    seen = set()
    for name in EVERY:
        for row in raw(out / f"{name}.csv"):
            expected = country.get(int(row["label"]), "")
            assert row["country"] == expected
            assert row["continent"] == (world[expected] if expected else "")
            seen.add(expected)
    assert {"OTHER", "", "FR"} < seen


def test_two_builds_write_the_same_bytes(gldv2, out, tmp_path):
    build(gldv2, out)
    build(gldv2, tmp_path / "again")
    for name in EVERY:
        path = tmp_path / "again" / f"{name}.csv"
        assert path.read_bytes() == (out / f"{name}.csv").read_bytes()


def test_real_landmarks_without_a_train_split_give_index_and_query(photos, out):
    counts = build(photos / "landmarks", out)
    assert counts == {"index": 110, "query": 59}
    assert set(lists.load(out, "index").labels) == {-1}
    assert (out / "solution.csv").exists()


def test_train_and_test_without_an_index_still_give_their_lists(gldv2, out):
    (gldv2 / "index").rename(gldv2 / "elsewhere")
    counts = build(gldv2, out)
    assert {"clean": 5, "c2x": 6, "full": 11, "query": 6}.items() <= counts.items()


# What looks like a number or a gap stays text


def test_text_that_looks_like_a_number_or_a_gap_stays_text(gldv2, out, world):
    build(gldv2, out, world)
    full = lists.load(out, "full")
    assert full.rows["id"].tolist()[1:3] == ["0000000000012345", "123456789012e345"]
    assert full.rows["id"][5] == "1234567890123456"
    landmarks = ["99", "30", "10", "10", "None", "0020", "99", "10", "30", "1e5", "20"]
    assert full.rows["landmark_id"].tolist() == landmarks
    countries = ["NA", "FR", "GB", "GB", "NA", "FR", "NA", "GB", "FR", "OTHER", "OTHER"]
    assert full.rows["country"].astype(str).tolist() == countries
    assert full.rows["continent"].astype(str).tolist()[0] == "Africa"
    for name in EVERY:
        loaded = lists.load(out, name)
        assert not loaded.rows.isna().any().any(), name
        for column in ("id", "path", "landmark_id"):
            assert all(type(value) is str for value in loaded.rows[column])
        assert loaded.ids.dtype == "U16"
        assert loaded.ids.tolist() == [row[0] for row in written(out / f"{name}.csv")]
        assert loaded.labels.dtype == np.int64
        assert loaded.hash == facts_of(out / f"{name}.csv")["hash"]


def test_some_columns_of_a_list_are_those_of_the_whole(gldv2, out):
    build(gldv2, out)
    whole = lists.load(out, "full")
    some = lists.load(out, "full", ("label", "country", "id"))
    assert sorted(some.rows) == ["country", "id", "label"]
    assert some.ids.tolist() == whole.ids.tolist()
    assert some.labels.tolist() == whole.labels.tolist()
    assert (some.hash, len(some)) == (whole.hash, 11)


def test_a_list_on_disk_comes_in_blocks_of_the_same_rows(gldv2, out, monkeypatch):
    build(gldv2, out)
    monkeypatch.setattr(lists, "BLOCK", 4)
    whole, stored = lists.load(out, "full"), lists.find(out, "full")
    assert (stored.name, stored.hash) == ("full", whole.hash)
    for one in (whole, stored):
        blocks = list(one.blocks(("id", "label", "country")))
        assert [len(block) for block in blocks] == [4, 4, 3]
        joined = pd.concat(blocks)
        for column in ("id", "label", "country"):
            assert joined[column].tolist() == whole.rows[column].tolist()
    with (out / "full.csv").open("a") as file:
        file.write("another\n")
    with pytest.raises(ValueError, match="full.csv: damaged.*00_image_lists"):
        lists.find(out, "full")


# Sizes


def test_sizes_are_those_of_the_picture_as_shown(gldv2, out):
    build(gldv2, out, sizes=True)
    expected, turned = {}, 0
    for path in gldv2.rglob("*.jpg"):
        name = path.relative_to(gldv2).as_posix()
        if path.stat().st_size:
            with Image.open(path) as image:
                shown = ImageOps.exif_transpose(image)
                expected[name] = (str(shown.height), str(shown.width))
                turned += shown.size != image.size
    assert turned > 3
    for name in EVERY:
        rows = raw(out / f"{name}.csv")
        for row in rows:
            size = expected.get(row["path"], ("-1", "-1"))
            assert (row["height"], row["width"]) == size
        bad = sum(row["path"] not in expected for row in rows)
        assert facts_of(out / f"{name}.csv")["unreadable headers"] == bad
    assert facts_of(out / "full.csv")["unreadable headers"] == 1
    assert facts_of(out / "index.csv")["unreadable headers"] == 1


def test_sizes_are_read_without_decoding(gldv2, out, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr("cv2.imdecode", refuse)
    monkeypatch.setattr("cv2.imread", refuse)
    build(gldv2, out, sizes=True)
    assert (lists.load(out, "clean").rows["height"] > 0).all()


def test_sizes_are_left_out_on_request(gldv2, out):
    build(gldv2, out, sizes=False)
    rows = lists.load(out, "full").rows
    assert set(rows["height"]) == set(rows["width"]) == {-1}
    assert facts_of(out / "full.csv")["unreadable headers"] is None


# What was dropped


def test_dropped_rows_are_counted_by_reason(gldv2, out, ids):
    build(gldv2, out, index_ids=ids("bbbb000000000001", "bbbb000000000007"))
    dropped = {}
    for name in EVERY:
        counts = facts_of(out / f"{name}.csv")["dropped"]
        dropped[name] = {reason: count for reason, count in counts.items() if count}
    unknown = {"index image of a place unknown to train": 4}
    searched = {"index image that validation searches": 5}
    assert dropped["clean"] == dropped["full"] == dropped["index"] == {}
    assert dropped["query"] == {}
    assert dropped["c2x"] == {"landmark is not in the clean list": 5}
    assert dropped["index_train"] == unknown
    assert dropped["index_train_holdout"] == unknown | searched
    assert dropped["all"] == unknown | {
        "query that is not in the test list": 1,
        "positive that is not in the index": 1,
        "positive of a place unknown to train": 2,
        "query without any label that train knows": 1,
    }
    lost = dropped["all_holdout"]
    assert lost == unknown | searched | {"row of a validation query": 5}


def test_kept_and_dropped_rows_add_up_to_the_sources(data, out, ids):
    names = [line["id"] for line in raw(data / "index/index.csv")]
    counts = build(data, out, index_ids=ids(*names[::4]))
    train, index, solution = (
        len(raw(data / name))
        for name in (
            "train/train.csv",
            "index/index.csv",
            "test/retrieval_solution_v2.1.csv",
        )
    )
    about = {name: facts_of(out / f"{name}.csv") for name in counts}
    lost = {name: sum(about[name]["dropped"].values()) for name in counts}
    assert counts["full"] == about["full"]["sources"]["train/train.csv"] == train
    assert counts["index"] == about["full"]["sources"]["index/index.csv"] == index
    assert about["all"]["sources"]["test/retrieval_solution_v2.1.csv"] == solution
    assert counts["c2x"] + lost["c2x"] == train
    for name in ("index_train", "index_train_holdout"):
        assert counts[name] + lost[name] == train + index
    whole = (
        counts["all"]
        + about["all"]["dropped"]["index image of a place unknown to train"]
    )
    assert counts["all_holdout"] + lost["all_holdout"] == whole
    # a query may stand in several rows of `all`, so the queries are counted
    tested = {row[0] for row in written(out / "all.csv") if row[1].startswith("test/")}
    gone = [n for why, n in about["all"]["dropped"].items() if why.startswith("query")]
    assert len(gone) == 2
    assert len(tested) + sum(gone) == solution


def test_rows_of_the_smaller_index_and_dropped_ones_add_up(data, out, ids):
    names = [line["id"] for line in raw(data / "index/index.csv")]
    counts = build(data, out, index_ids=ids(*names[::4]))
    lost = sum(facts_of(out / "index_val.csv")["dropped"].values())
    assert counts["index_val"] + lost == len(names)


def test_a_test_image_without_a_solution_is_kept_or_counted(gldv2, out):
    path = gldv2 / "test/retrieval_solution_v2.1.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "000004,None" not in line))
    build(gldv2, out)
    tested = {row[0] for row in written(out / "all.csv") if row[1].startswith("test/")}
    about = facts_of(out / "all.csv")["dropped"]
    outside = about.pop("query that is not in the test list")  # no row of test.csv
    gone = sum(
        count for why, count in about.items() if why.startswith(("query", "test"))
    )
    assert outside == 1
    assert len(tested) + gone == len(raw(gldv2 / "test/test.csv"))


def test_the_json_counts_what_the_csv_has(data, out):
    build(data, out)
    expected, country = definition(data)
    for name in EVERY:
        about, rows = facts_of(out / f"{name}.csv"), expected[name]
        assert about["name"] == name
        assert about["rows"] == len(rows)
        assert about["images"] == len({row[0] for row in rows})
        assert about["labels"] == len({row[3] for row in rows if row[3] >= 0})
        assert about["without label"] == sum(row[3] < 0 for row in rows)
        assert about["classes"] == len(country)


def test_describe_has_a_line_for_every_list(gldv2, out):
    counts = build(gldv2, out)
    table = lists.describe(out)
    assert dict(zip(table["list"], table["rows"], strict=True)) == counts
    c2x = table.set_index("list").loc["c2x"]
    assert c2x["dropped"] == "landmark is not in the clean list: 5"
    assert (c2x["labels"], c2x["without label"]) == (3, 0)


def test_the_solution_is_carried_along_without_answers_for_ignored_queries(gldv2, out):
    build(gldv2, out)
    given, kept = (
        raw(path)
        for path in (gldv2 / "test/retrieval_solution_v2.1.csv", out / "solution.csv")
    )
    for row in given:
        if row["Usage"] == "Ignored":
            row["images"] = ""
    assert kept == given


# Leaks


@pytest.mark.parametrize("smaller", [False, True])
def test_holdout_lists_have_no_validation_query_and_no_searched_image(
    data, out, ids, smaller
):
    names = [line["id"] for line in raw(data / "index/index.csv")]
    queries, answers = positives(data)
    searched = set(names[1::5]) | answers if smaller else set(names)
    build(data, out, index_ids=ids(*names[1::5]) if smaller else None)
    for name in ("index_train_holdout", "all_holdout"):
        held = {row[0] for row in written(out / f"{name}.csv")}
        assert not held & (queries | searched)
        assert not set(lists.load(out, name).ids.tolist()) & (queries | searched)
    everything = {row[0] for row in written(out / "all.csv")}
    assert everything & queries
    assert everything & searched
    if smaller:
        val = {row[0] for row in written(out / "index_val.csv")}
        assert val == searched & set(names)


def test_without_a_smaller_index_the_holdout_of_index_train_is_full(data, out):
    build(data, out)
    assert written(out / "index_train_holdout.csv") == written(out / "full.csv")


def test_leaks_finds_the_images_that_are_there(data, out, ids):
    names = [line["id"] for line in raw(data / "index/index.csv")]
    build(data, out, index_ids=ids(*names[::3]))
    queries, answers = positives(data)
    for searched in ("index", "index_val"):
        within = set(names) if searched == "index" else set(names[::3]) | answers
        forbidden = queries | (within & set(names))
        expected = {}
        for name in EVERY:
            common = forbidden & {row[0] for row in written(out / f"{name}.csv")}
            if common:
                expected[name] = len(common)
        seen = {facts_of(out / f"{name}.csv")["hash"]: name for name in EVERY}
        found = lists.leaks(seen, out, lists.load(out, searched))
        assert found == expected
        assert {"index", "index_train", "all", "query"} <= set(found)
        clear = {"clean", "c2x", "full"}
        if searched == "index_val":
            clear |= {"index_train_holdout", "all_holdout"}
        assert not clear & set(found)


def test_holdout_lists_of_the_whole_index_do_not_leak(gldv2, out):
    build(gldv2, out)
    names = ("full", "index_train_holdout", "all_holdout")
    index = lists.load(out, "index")
    for name in names:
        assert lists.leaks({lists.load(out, name).hash: name}, out, index) == {}


def test_a_list_that_nobody_knows_counts_as_minus_one(gldv2, out):
    build(gldv2, out)
    index = lists.load(out, "index")
    seen = {"0" * 64: "of old", lists.load(out, "clean").hash: "clean"}
    assert lists.leaks(seen, out, index) == {"of old": -1}


def test_a_list_counts_by_its_hash_and_not_by_its_name(gldv2, out):
    build(gldv2, out)
    seen = {lists.load(out, "all").hash: "clean"}
    # 6 known index images, 3 queries that count
    assert lists.leaks(seen, out, lists.load(out, "index")) == {"clean": 9}


# Refusals


def refused(error, kind):
    """The message, which is one line."""
    assert type(error.value) is kind
    message = str(error.value)
    assert message and "\n" not in message
    return message


def everything(folder):
    """Every file's content, so that nothing can change unseen."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_country_without_a_continent_is_refused_before_anything_is_written(
    gldv2, out, world
):
    build(gldv2, out, world)
    before = everything(out)
    del world["NA"]
    with pytest.raises(ValueError) as error:
        build(gldv2, out, world)
    assert "country NA (2 landmarks) has no continent" in refused(error, ValueError)
    assert everything(out) == before


def test_an_id_that_is_not_of_the_index_is_refused_before_anything_is_written(
    gldv2, out, ids
):
    with pytest.raises(ValueError) as error:
        build(gldv2, out, index_ids=ids("bbbb000000000001", "0000000000054321"))
    message = refused(error, ValueError)
    assert "index_ids.csv: '0000000000054321' is not an image of the index" in message
    assert not out.exists()


def test_an_id_list_needs_no_header(gldv2, out, ids):
    first = build(gldv2, out, index_ids=ids("bbbb000000000008", header=True))
    again = build(gldv2, out, index_ids=ids("bbbb000000000008", header=False))
    assert first == again
    assert first["index_val"] == 6 + 1  # six images answer some query


def test_a_list_that_is_not_there_is_refused_with_those_that_are(gldv2, out):
    build(gldv2, out)
    with pytest.raises(FileNotFoundError) as error:
        lists.load(out, "c2y")
    message = refused(error, FileNotFoundError)
    assert "no list c2y" in message
    assert all(name in message for name in EVERY)
    with pytest.raises(FileNotFoundError, match="there: none"):
        lists.load(out / "nowhere", "clean")


def test_a_list_without_its_json_is_refused(gldv2, out):
    build(gldv2, out)
    (out / "clean.json").unlink()
    with pytest.raises(FileNotFoundError, match="no list clean"):
        lists.load(out, "clean")


def test_a_list_edited_by_hand_is_refused(gldv2, out):
    build(gldv2, out)
    path = out / "clean.csv"
    path.write_text(path.read_text().replace(",0,1,", ",1,1,", 1))
    with pytest.raises(ValueError) as error:
        lists.load(out, "clean")
    assert f"{path}: damaged" in refused(error, checksums.Damaged)


@pytest.mark.parametrize("name", ["clean.json", "solution.csv", "solution.json"])
def test_a_flipped_byte_is_refused_by_name(gldv2, out, name):
    build(gldv2, out)
    path = out / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(checksums.Damaged, match=rf"{name}: .*00_image_lists"):
        lists.load(out, "clean")
        tables.read_solution(out / "solution.csv")


def test_facts_without_any_row_are_refused(gldv2, out):
    facts = sources.official(gldv2)
    tables = ("train", "clean", "index", "query", "solution")
    empty = replace(facts, **{name: getattr(facts, name).iloc[:0] for name in tables})
    with pytest.raises(ValueError) as error:
        lists.build(empty, gldv2, out, sizes=False)
    refused(error, ValueError)
    assert not list(out.glob("*.csv"))


def test_a_disk_that_fills_up_leaves_no_half_list(gldv2, out, monkeypatch):
    build(gldv2, out)
    calls, whole = [], lists._finished

    def fail_at_the_third(*arguments):
        calls.append(arguments)
        for block in whole(*arguments):
            if len(calls) == 3:
                yield block[:2]
                raise OSError(28, "No space left on device")
            yield block

    path = gldv2 / "train/train_clean.csv"
    path.write_text(path.read_text().replace("30,aaaa000000000006 ", "30,"))
    monkeypatch.setattr(lists, "_finished", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        build(gldv2, out)
    assert len(calls) == 3
    assert not [path for path in out.iterdir() if path.name.endswith(".part")]
    assert len(lists.load(out, "clean")) == 4  # new
    assert len(lists.load(out, "full")) == 11  # the third: still the old one, and whole
    expected, _ = definition(gldv2)
    for name in EVERY:
        assert len(lists.load(out, name)) == len(expected[name])


def test_a_build_from_other_data_leaves_no_list_of_the_earlier_one(gldv2, out):
    build(gldv2, out)
    for split in ("index", "test"):
        (gldv2 / split).rename(gldv2 / f"no_{split}")
    build(gldv2, out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        f"{n}.{e}" for n in ("clean", "c2x", "full") for e in ("csv", "json")
    }


def test_a_build_leaves_files_alone_that_no_build_wrote(gldv2, out):
    out.mkdir(parents=True)
    mine = {"table.csv": "path,label\n", "settings.json": '{"mine": 1}'}
    for name, text in mine.items():
        (out / name).write_text(text)
    build(gldv2, out)
    for name, text in mine.items():
        assert (out / name).exists(), name
        assert (out / name).read_text() == text


def first_generation(gldv2, images: dict[str, tuple[int, int, str]]) -> None:
    """gld_v1/ of pictures with the given height, width and landmark."""
    lines = ["id,url,landmark_id"]
    for name, (height, width, landmark) in images.items():
        lines.append(f"{name},http://x,{landmark}")
        path = gldv2 / "gld_v1" / name[0] / name[1] / name[2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if height:
            Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    (gldv2 / "gld_v1/train.csv").write_text("\n".join(lines) + "\n")


def test_the_first_generation_is_cut_and_labelled_on_its_own(gldv2, tmp_path):
    ids = [f"{number:016x}" for number in range(9)]
    landmarks = ["9", "9", "10", "10", "10", "2", "2", "7", "2"]
    sides = [
        (30, 40),
        (40, 30),
        (30, 30),
        (50, 50),
        (50, 31),
        (30, 99),
        (29, 99),
        (60, 60),
        (0, 0),
    ]
    images = {
        i: (*side, mark) for i, side, mark in zip(ids, sides, landmarks, strict=True)
    }
    first_generation(gldv2, images)
    facts = sources.official(gldv2)
    lists.build(facts, gldv2, tmp_path, gld_v1_classes=3, gld_v1_side=30)
    rows = lists.load(tmp_path, "gld_v1").rows
    # 2 keeps one of three images and 7 has one: the smaller number stays among equals
    assert list(zip(rows["landmark_id"], rows["label"], strict=True)) == [
        *[("9", 1)] * 2,
        *[("10", 2)] * 3,
        ("2", 0),
    ]
    about = json.loads((tmp_path / "gld_v1.json").read_text())
    assert about["dropped"] == {
        "shorter side under 30, or unreadable": 2,
        "landmark is not among the 3 most frequent": 1,
    }
    assert about["classes"] == 3
    with pytest.raises(ValueError, match="gld_v1: no image has a shorter side of 500"):
        lists.build(facts, gldv2, tmp_path / "other", gld_v1_side=500)


def test_data_without_the_first_generation_give_no_such_list(gldv2, tmp_path):
    facts = sources.official(gldv2)
    with pytest.raises(ValueError, match="gives no list gld_v1"):
        lists.build(facts, gldv2, tmp_path, wanted=["gld_v1"])


def test_excluded_images_are_in_no_list_to_train_on_and_counted_in_each(gldv2, out):
    build(gldv2, out)
    before = {name: lists.load(out, name).rows["id"] for name in EVERY}
    excluded = {
        "aaaa000000000006": "near-duplicate",
        "bbbb000000000002": "near-duplicate",  # of the index, and known to train
        "0000000000054321": "landmark of rparis",  # of the queries
    }
    facts = sources.read(gldv2, excluded=excluded)
    lists.build(facts, gldv2, out, sizes=False)
    for name in EVERY:
        now = lists.load(out, name).rows["id"].tolist()
        if name in ("index", "query"):
            assert now == before[name].tolist()
            continue
        assert now == before[name][~before[name].isin(excluded)].tolist(), name
        told = facts_of(out / f"{name}.csv")["dropped"]
        lost = before[name].map(excluded).value_counts()
        if name in ("clean", "full"):
            assert told == {f"excluded: {why}": n for why, n in lost.items()}
    told = facts_of(out / "all.csv")["dropped"]
    assert told["excluded: near-duplicate"] == 1  # of what full does not have
    assert told["excluded: landmark of rparis"] == 1


def test_excluded_images_are_not_in_the_list_of_the_first_generation(gldv2, out):
    names = [f"eeee00000000000{n}" for n in range(3)]
    (gldv2 / "gld_v1").mkdir()
    lines = [f"{name},{n % 2}\n" for n, name in enumerate(names)]
    (gldv2 / "gld_v1/train.csv").write_text("id,landmark_id\n" + "".join(lines))
    facts = sources.read(gldv2, excluded={names[0]: "near-duplicate of query"})
    lists.build(facts, gldv2, out, sizes=False)
    assert lists.load(out, "gld_v1").rows["id"].tolist() == names[1:]
    told = facts_of(out / "gld_v1.csv")["dropped"]
    assert told["excluded: near-duplicate of query"] == 1


def test_both_truths_are_written_beside_the_lists(gldv2, out):
    path = gldv2 / "test/recognition_solution_v2.1.csv"
    path.write_text("id,landmarks,Usage\ncccc000000000001,10 0020,Private\n")
    build(gldv2, out)
    assert (out / "recognition.csv").read_text() == path.read_text()
    table = tables.read_recognition(out / "recognition.csv")
    assert table["landmarks"].tolist() == ["10 0020"]
    path.unlink()
    build(gldv2, out)
    assert not (out / "recognition.csv").exists() and (out / "solution.csv").exists()


def test_memory_must_be_linear_where_a_held_out_class_is_large(tmp_path):
    def built(count):
        """Peak of bytes, and of the file, for one held-out class of so many images."""
        names = [f"c/{n}.jpg" for n in range(count)]
        rows = [
            (name, "c", "x", "query" if n % 4 == 0 else "index")
            for n, name in enumerate(names)
        ]
        rows.append(("a/0.jpg", "a", "x", "train"))
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a/0.jpg").touch()
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c/0.jpg").touch()
        (tmp_path / "c/1.jpg").touch()
        table = tmp_path / "t.csv"
        pd.DataFrame(rows, columns=["path", "label", "group", "split"]).to_csv(
            table, index=False
        )
        tracemalloc.start()
        lists.build(
            sources.from_csv(table, tmp_path), tmp_path, tmp_path / "lists", sizes=False
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, (tmp_path / "lists/solution.csv").stat().st_size

    built(100)  # what is loaded once
    (small, one), (large, other) = built(1000), built(3000)
    assert other > 8 * one  # the file is quadratic
    assert large < 4 * small


def test_a_solution_of_a_size_that_nobody_can_read_must_be_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lists, "LARGEST_SOLUTION", 100)
    for name in [f"{c}/{n}.jpg" for c in "abc" for n in range(12)]:
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    with pytest.raises(ValueError, match="3 queries"):
        lists.build(
            sources.from_folders(tmp_path / "p"), tmp_path / "p", tmp_path / "lists"
        )
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_classes_to_hold_one_out_must_be_said(tmp_path, count):
    for c in "ab"[:count]:
        (tmp_path / "p" / c).mkdir(parents=True)
        (tmp_path / "p" / c / "0.jpg").touch()
    facts = sources.from_folders(tmp_path / "p")
    with pytest.raises(ValueError, match=f"held out.* {count}$"):
        lists.build(facts, tmp_path / "p", tmp_path / "lists", wanted=["query"])


def test_missing_images_must_be_counted_and_named(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.jpg").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").unlink()
    text = "path,label\n" + "".join(f"{n}.jpg,c{n % 2}\n" for n in range(6))
    (tmp_path / "t.csv").write_text(text)
    lists.build(
        sources.from_csv(tmp_path / "t.csv", tmp_path), tmp_path, tmp_path / "lists"
    )
    table = lists.describe(tmp_path / "lists").set_index("list")
    assert table.loc["full", "missing or unreadable"] == 5
    about = json.loads((tmp_path / "lists/full.json").read_text())
    assert about["unreadable, such as"] == [f"{n}.jpg" for n in range(1, 6)]
