"""Truncated, mutated and hostile rows of CSVs: they are read, or refused in one line of ours."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kit.answers import gain_table, submission
from kit.data import exclusions, lists, sources, tables

TABLES = (
    *("train/train.csv", "train/train_clean.csv", "train/train_label_to_category.csv"),
    *("index/index.csv", "index/index_image_to_landmark.csv"),
    *("index/index_label_to_category.csv", "test/test.csv"),
    *("test/retrieval_solution_v2.1.csv", "test/recognition_solution_v2.1.csv"),
    "train/country/FR.json",
)
HOSTILE = (
    *(b"", b" ", b"\0", b"\xff\xfe", b'"', b'""', b'"\n', b",", b",,,,", b"\n", b"\r"),
    *(b"../../../../etc/passwd", b"/etc/passwd", b"..", b"~/x", b"%2e%2e%2f"),
    *(b"=cmd|' /C calc'!A0", b"nan", b"NA", b"None", b"-1", b"1e999", b"0x10"),
    *(
        "١٢٣٤٥٦٧٨٩٠١٢٣٤٥٦".encode(),
        "ａ".encode() * 16,
        "\u2028".encode(),
        b"\xef\xbb\xbf",
    ),
    *(b"99999999999999999999999999", b"A" * 16, b"a" * 15, b"a" * 17, b"0" * 5_000),
    *(b"Category:", b"%", b"%FF%FE", b"[", b"{}", b"aaaa000000000001", b"[[[[[["),
)
Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "put", "flip", "field", "twice", "drop", "tail"]),
        st.floats(0, 1, exclude_max=True),  # where
        st.one_of(st.sampled_from(HOSTILE), st.binary(min_size=1, max_size=6)),
    ),
    min_size=1,
    max_size=3,
)
ROWS = 10_000  # edited ones, in the slow test


def edited(text: bytes, edits: list[Edit]) -> bytes:
    for kind, where, what in edits:
        at = int(where * len(text))
        lines = text.split(b"\n")
        row = int(where * len(lines))
        if kind == "cut":
            text = text[:at]
        elif kind == "put":
            text = text[:at] + what + text[at:]
        elif kind == "flip" and text:
            text = (
                text[:at] + bytes([text[at] ^ what[0]] if what else []) + text[at + 1 :]
            )
        elif kind == "field":
            fields = lines[row].split(b",")
            fields[int(where * 7919) % len(fields)] = what
            text = b"\n".join([*lines[:row], b",".join(fields), *lines[row + 1 :]])
        elif kind == "twice":
            text = b"\n".join([*lines[: row + 1], *lines[row:]])
        elif kind == "drop":
            text = b"\n".join(lines[:row] + lines[row + 1 :])
        elif kind == "tail":
            text += what
    return text


def examples(count: int):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def tree(folder: Path, *but: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(each in path.parents for each in but)
    }


def in_one_line(error: Exception) -> bool:
    """Ours: no subclass that something below has raised, and one line that says what is wrong."""
    return type(error) in (ValueError, FileNotFoundError) and "\n" not in str(error)


@pytest.fixture
def data(gldv2):
    path = gldv2 / "test/recognition_solution_v2.1.csv"
    path.write_text("id,landmarks,Usage\ncccc000000000001,10 0020,Private\n")
    return gldv2


def read_and_built(data: Path, name: str, edits: list[Edit], folder: Path) -> str:
    """Reads a data folder with an edited table, and writes its lists into `folder`/out."""
    whole = (data / name).read_bytes()
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    (data / name).write_bytes(edited(whole, edits))
    before = tree(folder, out)
    try:
        facts = sources.read(data)
        lists.build(facts, data, out, sizes=False)
        for path in out.glob("*.csv"):
            if path.with_suffix(".json").exists() and path.name not in lists.TRUTHS:
                rows = lists.load(out, path.stem).rows
                assert rows["id"].str.fullmatch(sources.ID).all()
                assert not rows["path"].str.contains("..", regex=False).any()
                assert not rows["path"].str.startswith("/").any()
        return "read"
    except (ValueError, OSError) as error:
        assert in_one_line(error), (name, edits, repr(error))
        return "refused"
    finally:
        assert tree(folder, out) == before
        (data / name).write_bytes(whole)


def check(data: Path, folder: Path, count: int) -> None:
    found = {"read": 0, "refused": 0}

    @examples(count)
    @given(st.sampled_from(TABLES), EDITS)
    def run(name, edits):
        found[read_and_built(data, name, edits, folder)] += 1

    run()
    assert min(found.values()) > count / 20, found  # both happen


def test_hostile_tables_are_read_or_refused_in_one_line(data, tmp_path):
    check(data, tmp_path, 150)


@pytest.mark.slow
def test_thousands_of_hostile_rows_are_read_or_refused_in_one_line(data, tmp_path):
    check(data, tmp_path, ROWS // 2)  # of two edits each


READERS = {
    "submission": (submission.read, b"id,images\na,b c\nd,\n"),
    "gains": (gain_table.read, b"step,public,private,note\nsearch,0.1,0.2,x\n"),
    "exclusions": (exclusions.read, b"id,reason,of\naaaa000000000001,near,b\n"),
    "recognition": (tables.read_recognition, b"id,landmarks,Usage\na,1,Public\n"),
    "solution": (tables.read_solution, b"id,images,Usage\na,b c,Public\n"),
    "continents": (tables.read_continents, b"country,continent\nFR,Europe\n"),
}


@pytest.mark.parametrize("name", READERS)
def test_other_tables_are_read_or_refused_in_one_line(name, tmp_path):
    read, whole = READERS[name]
    path = tmp_path / f"{name}.csv"

    @examples(400)
    @given(EDITS)
    def run(edits):
        path.write_bytes(edited(whole, edits))
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert in_one_line(error), (edits, repr(error))

    run()
