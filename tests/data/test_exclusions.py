import json

import pytest

from kit import files
from kit.data import exclusions
from kit.data.exclusions import Exclusion

ROWS = [
    Exclusion("0059123412341234", "near-duplicate of index", "bbbb000000000001"),
    Exclusion("123456789012e345", "landmark of roxford", "roxford/all_souls"),
    Exclusion("0059123412341234", "landmark of roxford", "roxford/all_souls"),
    Exclusion("aaaa000000000001", "near-duplicate of index, by eye", ""),
]


@pytest.fixture
def path(tmp_path):
    return exclusions.write(tmp_path / "exclusions.csv", ROWS, {"bits": 6})


def test_what_was_written_is_read_and_an_images_first_reason_counts(path):
    assert exclusions.read(path) == {
        "0059123412341234": "near-duplicate of index",
        "123456789012e345": "landmark of roxford",
        "aaaa000000000001": "near-duplicate of index, by eye",
    }


def test_the_files_can_be_read_without_us(path):
    assert path.read_text() == (
        "id,reason,of\n"
        "0059123412341234,near-duplicate of index,bbbb000000000001\n"
        "123456789012e345,landmark of roxford,roxford/all_souls\n"
        'aaaa000000000001,"near-duplicate of index, by eye",\n'
    )
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["bits"] == 6
    assert about["images"] == 3
    assert about["reasons"] == {
        "near-duplicate of index": 1,
        "landmark of roxford": 1,
        "near-duplicate of index, by eye": 1,
    }
    assert about["hash"] == files.sha256(path)


def test_nothing_to_exclude_is_a_list_too(tmp_path):
    path = exclusions.write(tmp_path / "none.csv", [], {})
    assert exclusions.read(path) == {}


def test_a_list_is_written_whole_or_not_at_all(path):
    before = path.read_bytes()

    def rows():
        yield Exclusion("ffff000000000001", "near-duplicate of query", "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exclusions.write(path, rows(), {})
    assert path.read_bytes() == before
    assert len(exclusions.read(path)) == 3


def test_a_list_written_by_hand_needs_no_json_and_no_third_column(tmp_path):
    path = tmp_path / "hand.csv"
    path.write_text("reason,id\nblurred,aaaa000000000001\n", encoding="utf-8")
    assert exclusions.read(path) == {"aaaa000000000001": "blurred"}


def test_a_list_changed_after_it_was_written_is_refused(path):
    path.write_text(path.read_text() + "ffff000000000009,by hand,\n")
    with pytest.raises(ValueError, match=r"exclusions\.csv: damaged.*audit"):
        exclusions.read(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("id,url\naaaa000000000001,x\n", "no column reason"),
        ("", "no column id"),
        ("id,reason\n1234,short\n", "line 2 is not the id of an image and a reason"),
        ("id,reason\nAAAA000000000001,x\n", "line 2 is not the id"),
        ("id,reason\naaaa000000000001,\n", "line 2 is not the id of an image and a"),
        ("id,reason\naaaa000000000001\n", "line 2 is not the id of an image and a"),
        ("id,reason\naaaa000000000001,x,y,z\n", "line 2 is not the id"),
        (
            "id,reason\n" + "aaaa000000000001,x\n" * 2,
            "line 3 has aaaa000000000001 once",
        ),
        ('id,reason\naaaa000000000001,"x\n', "not a CSV file"),
        ("id,reason\naaaa000000000001," + "x" * 200_000, "not a CSV file"),
        (b"id,reason\naaaa000000000001,\xff\xfe\n", "not a CSV file"),
    ],
)
def test_what_is_no_exclusion_list_is_refused(tmp_path, content, problem):
    path = tmp_path / "wrong.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem) as refused:
        exclusions.read(path)
    assert str(path) in str(refused.value)


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such exclusion list"):
        exclusions.read(tmp_path / "gone.csv")


def test_another_file_is_not_replaced(tmp_path):
    path = tmp_path / "full.csv"
    path.write_text("id,path\naaaa000000000001,train/a.jpg\n")
    with pytest.raises(ValueError, match="no exclusion list"):
        exclusions.write(path, ROWS, {})
    assert path.read_text().startswith("id,path")
    with pytest.raises(ValueError, match=r"an exclusion list is a \.csv"):
        exclusions.write(tmp_path / "exclusions.json", ROWS, {})
