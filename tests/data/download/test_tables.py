import pytest

from kit.data import sources
from kit.data.download import official, parts, tables
from tests.conftest import ROOT

KNOWN = official.read(ROOT / "datasets_meta/gldv2.json")
RECOGNITION = """\
id,landmarks,Usage
cccc000000000001,30 10,Private
cccc000000000003,99,Private
0000000000054321,None,Public
cccc000000000005,,Public
"""


@pytest.fixture
def metadata(gldv2):
    (gldv2 / "test/recognition_solution_v2.1.csv").write_text(RECOGNITION)
    return gldv2


def text(path):
    return path.read_text(encoding="utf-8").splitlines()


def cut(metadata, out, there, landmarks=None, splits=official.SPLITS):
    """The tables where only the images with these ids are there."""
    seen = lambda path: path.split("/")[-1].removesuffix(".jpg") in there
    return tables.write(metadata, out, KNOWN, splits, seen, landmarks)


def every_id(metadata):
    ids = set()
    for split in official.SPLITS:
        ids |= {line.split(",")[0] for line in text(metadata / f"{split}/{split}.csv")}
    return ids


def test_landmarks_come_in_the_order_of_labels(metadata):
    labels = ["30", "10", "0020", "99", "None", "1e5", "20"]
    for count in range(1, 8):
        assert parts.choose(metadata, count).landmarks == set(labels[:count])
    for count in (0, 8):
        with pytest.raises(ValueError, match="train has 7"):
            parts.choose(metadata, count)


def test_drawn_landmarks_are_clean_ones_first_and_differ_by_seed(metadata):
    drawn = {parts.choose(metadata, 1, seed).landmarks for seed in range(30)}
    assert drawn == {frozenset(["30"]), frozenset(["10"]), frozenset(["0020"])}
    for seed in range(9):
        part = parts.choose(metadata, 4, seed)
        assert part.landmarks > {"30", "10", "0020"}
        assert part == parts.choose(metadata, 4, seed)


def test_a_part_has_all_images_of_its_landmarks_in_all_splits(metadata):
    part = parts.choose(metadata, 1)  # 30, which is place 10 in the index
    assert part.ids["train"] == {
        *("0000000000012345", "aaaa000000000006"),
        "aaaa000000000005",  # only the clean list has it under 30
    }
    assert part.ids["index"] == {"bbbb000000000001", "99999999e9999999"}
    assert part.ids["test"] == {
        *("cccc000000000001", "cccc000000000006"),
    }


def test_a_name_that_two_landmarks_have_is_the_first_ones(metadata):
    first = parts.choose(metadata, 3)  # 0020 is Pont Neuf, before 99
    assert "0000000000099999" in first.ids["index"]
    lines = text(metadata / "train/train_label_to_category.csv")
    swapped = [lines[0], *reversed(lines[1:])]
    (metadata / "train/train_label_to_category.csv").write_text("\n".join(swapped))
    second = parts.choose(metadata, 3)
    assert "0000000000099999" not in second.ids["index"]


def test_with_all_images_there_every_row_of_a_table_stays(metadata, tmp_path):
    rows = cut(metadata, tmp_path, every_id(metadata))
    for place in KNOWN.tables:
        before, after = text(metadata / place), text(tmp_path / place)
        assert len(after) == rows[place] + 1
        if place.split("/")[1] in ("train.csv", "train_clean.csv", "index.csv"):
            assert after == before


def test_only_what_is_there_stays(metadata, tmp_path):
    there = {"0000000000012345", "aaaa000000000001", "aaaa000000000005"}
    there |= {"bbbb000000000001", "bbbb000000000004", "bbbb000000000005"}
    there |= {"cccc000000000001", "cccc000000000003", "cccc000000000005"}
    there |= {"0000000000054321"}
    cut(metadata, tmp_path, there)
    assert [line.split(",")[0] for line in text(tmp_path / "train/train.csv")[1:]] == [
        *("aaaa000000000001", "0000000000012345", "aaaa000000000005"),
    ]
    assert '"http://x/a,b.jpg"' in text(tmp_path / "train/train.csv")[2]
    assert text(tmp_path / "train/train_clean.csv") == [
        "landmark_id,images",
        "30,0000000000012345 aaaa000000000005",
    ]
    labels = text(tmp_path / "train/train_label_to_category.csv")[1:]
    assert [line.split(",")[0] for line in labels] == ["10", "30", "99"]
    assert text(tmp_path / "index/index.csv") == [
        *("id", "bbbb000000000001", "bbbb000000000004", "bbbb000000000005"),
    ]
    places = text(tmp_path / "index/index_image_to_landmark.csv")[1:]
    assert places == ["bbbb000000000004,7", "bbbb000000000001,10"]
    labels = text(tmp_path / "index/index_label_to_category.csv")[1:]
    assert [line.split(",")[0] for line in labels] == ["10", "7"]
    assert text(tmp_path / "test/retrieval_solution_v2.1.csv")[1:] == [
        "cccc000000000001,bbbb000000000001 bbbb000000000004,Private",
        "cccc000000000003,bbbb000000000004,Private",
        "0000000000054321,None,Ignored",  # its answers are not there
        "cccc000000000005,None,Ignored",
    ]
    assert text(tmp_path / "test/recognition_solution_v2.1.csv")[1:] == [
        "cccc000000000001,30 10,Private",
        "cccc000000000003,99,Private",
        "0000000000054321,,Public",  # landmark None is not there
        "cccc000000000005,,Public",
    ]


def test_without_an_index_the_answers_stay_as_they_are(metadata, tmp_path):
    cut(metadata, tmp_path, {"cccc000000000001"}, splits=["test"])
    assert text(tmp_path / "test/retrieval_solution_v2.1.csv")[1:] == [
        line
        for line in text(metadata / "test/retrieval_solution_v2.1.csv")
        if line.startswith("cccc000000000001")
    ]
    row = text(tmp_path / "test/recognition_solution_v2.1.csv")[1]
    assert row == "cccc000000000001,30 10,Private"
    assert not (tmp_path / "index").exists()


def test_landmarks_that_were_not_chosen_have_no_row(metadata, tmp_path):
    part = parts.choose(metadata, 1)
    there = frozenset().union(*part.ids.values())
    cut(metadata, tmp_path, there, part.landmarks)
    assert {line.split(",")[-1] for line in text(tmp_path / "train/train.csv")[1:]} == {
        "30"
    }  # and not 10, under which train.csv has one of its clean images
    assert [r.split(",")[0] for r in text(tmp_path / "train/train_clean.csv")] == [
        *("landmark_id", "30"),
    ]


def test_tables_are_cut_block_by_block_as_at_once(metadata, tmp_path, monkeypatch):
    there = set(sorted(every_id(metadata))[::2])
    cut(metadata, tmp_path / "once", there)
    monkeypatch.setattr(tables, "BLOCK", 2)
    cut(metadata, tmp_path / "blocks", there)
    for place in KNOWN.tables:
        once = (tmp_path / "once" / place).read_bytes()
        assert (tmp_path / "blocks" / place).read_bytes() == once


def test_a_cut_set_gives_lists(metadata, tmp_path):
    part = parts.choose(metadata, 2)
    there = frozenset().union(*part.ids.values())
    data = tmp_path / "data"
    cut(metadata, data, there, part.landmarks)
    for path in metadata.rglob("?/?/?/*.jpg"):
        target = data / path.relative_to(metadata)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    ours, whole = sources.read(data), sources.read(metadata)
    assert ours.clean.equals(whole.clean[whole.clean["label"] < 2])
    known = whole.index[whole.index["label"].isin([0, 1])].reset_index(drop=True)
    assert ours.index.equals(known)


def test_a_table_without_its_columns_or_that_is_none_is_refused(metadata, tmp_path):
    out = tmp_path / "out"
    (metadata / "train/train.csv").write_text("name,landmark_id\na,1\n")
    with pytest.raises(ValueError, match=r"train.csv: no column id"):
        cut(metadata, out, set())
    (metadata / "train/train.csv").write_bytes(b"id,landmark_id\na,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"train.csv: not a CSV file"):
        cut(metadata, out, set())
    (metadata / "train/train.csv").write_text("id,landmark_id\n../../etc,1\n")
    with pytest.raises(ValueError, match="'../../etc' is not an id of 16 hex digits"):
        cut(metadata, out, set())
    assert not [*out.rglob("*.csv")]
