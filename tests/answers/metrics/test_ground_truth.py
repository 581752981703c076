import builtins
import json
import os
import pickle
import random

import numpy as np
import pytest

from kit.answers.metrics import ground_truth
from kit.answers.metrics.ground_truth import plain, read, write

# as the published files are
PUBLISHED = {
    "imlist": [f"image_{number:06}" for number in range(9)],
    "qimlist": ["asked_000013", "asked_000026"],
    "gnd": [
        {"bbx": [136.5, 34.1, 648.5, 955.7], "easy": [3, 0], "hard": [], "junk": [8]},
        {"bbx": [1, 2, 30, 40], "easy": [], "hard": [4], "junk": []},
    ],
}


def saved(tmp_path, value, protocol=3):
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def told(truth):
    return [
        (q.image, q.box, {name: rows.tolist() for name, rows in q.groups.items()})
        for q in truth.queries
    ]


@pytest.mark.parametrize("protocol", range(6))
def test_the_published_pickle_is_read(tmp_path, protocol):
    truth = read(saved(tmp_path, PUBLISHED, protocol))
    assert truth.kind == "revisited" and truth.images == PUBLISHED["imlist"]
    assert told(truth) == [
        (
            "asked_000013",
            (136.5, 34.1, 648.5, 955.7),
            {"easy": [3, 0], "hard": [], "junk": [8]},
        ),
        ("asked_000026", (1, 2, 30, 40), {"easy": [], "hard": [4], "junk": []}),
    ]
    assert set(truth.setups) == {"Easy", "Medium", "Hard"}


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]q\x00(U\x03oneq\x01T\x03\x00\x00\x00twoq\x02K\x07e.",
        b"(lp0\nS'one'\np1\naS'two'\np2\naI7\na.",
    ],
)
def test_text_as_python_2_pickled_it_is_read(data):
    assert plain(data) == ["one", "two", 7]


def test_a_pickle_of_the_older_benchmarks_is_read(tmp_path):
    about = {"bbx": [1, 2, 3, 4], "ok": [0, 1], "junk": [2]}
    truth = read(saved(tmp_path, PUBLISHED | {"gnd": [about] * 2}))
    assert truth.kind == "classic"
    assert told(truth)[0][2] == {"good": [], "ok": [0, 1], "junk": [2]}


def test_what_is_written_as_json_is_read_the_same(tmp_path):
    truth = read(saved(tmp_path, PUBLISHED))
    again = read(write(truth, tmp_path / "truth.json"))
    assert (again.kind, again.images, told(again)) == (
        truth.kind,
        truth.images,
        told(truth),
    )


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        Evil(os.system, ("touch stolen",)),
        Evil(builtins.eval, ("open('stolen', 'w')",)),
        Evil(builtins.set, ([],)),
        [1, {"imlist": Evil(os.mkdir, ("stolen",))}],
        np.arange(3),
        np.float64(0.5),
        {1, 2},
        b"bytes",
        os.system,
    ],
    ids=["system", "eval", "set()", "inside", "array", "scalar", "set", "bytes", "fn"],
)
def test_a_pickle_that_holds_more_than_plain_values_is_refused(
    tmp_path, monkeypatch, value, protocol
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"gnd_roxford5k.pkl: not a ground truth \("):
        read(saved(tmp_path, value, protocol))
    assert [path.name for path in tmp_path.iterdir()] == ["gnd_roxford5k.pkl"]


def test_each_lock_holds_alone(tmp_path, monkeypatch):
    """Names are not looked up even where an instruction that names them gets through."""
    data = pickle.dumps(Evil(os.mkdir, (str(tmp_path / "stolen"),)), 2)
    with pytest.raises(ValueError, match="its pickle has GLOBAL, beside lists"):
        plain(data)
    more = {"GLOBAL", "REDUCE", "BINPERSID"}
    monkeypatch.setattr(ground_truth, "_PLAIN", ground_truth._PLAIN | more)
    with pytest.raises(ValueError, match=r"its pickle names (posix|nt)\.mkdir"):
        plain(data)
    with pytest.raises(ValueError, match="names something outside"):
        plain(b"\x80\x02K\x05Q.")
    assert not (tmp_path / "stolen").exists()


def test_a_pickle_of_lists_in_lists_is_not_shown_whole(tmp_path):
    name = ["x"]
    for _ in range(20):
        name = [name] * 2  # a million of them if they were shown
    truth = {"imlist": [name], "qimlist": [], "gnd": []}
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(truth, protocol=2))
    with pytest.raises(ValueError, match="is no name of an image") as refusal:
        read(path)
    assert len(str(refusal.value)) < 5000 and path.stat().st_size < 1000


def test_a_pickle_cannot_ask_for_more_memory_than_it_has_bytes():
    with pytest.raises(ValueError, match="counts more values than it has bytes"):
        plain(b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="more values than it has bytes"):
        plain(b"]p2147483647\n.")


@pytest.mark.parametrize("seed", range(8))
def test_a_mutated_pickle_is_read_or_refused_in_one_line(tmp_path, seed):
    draw = random.Random(seed)
    whole = saved(tmp_path, PUBLISHED, draw.choice([2, 3, 4])).read_bytes()
    path = tmp_path / "mutated.pkl"
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3, 12])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            read(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: not a ground truth (")
            assert "\n" not in str(error)
    assert refused > 100
    assert {each.name for each in tmp_path.iterdir()} == {
        "mutated.pkl",
        "gnd_roxford5k.pkl",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind 'other' is not one of revisited, classic, labels"),
        ({"images": ["a", "b", "a"]}, "image a stands there twice"),
        ({"images": ["a", 3]}, "3 is no name of an image"),
        ({"images": ["a", "b\nc"]}, "'b\\nc' is no name of an image"),
        ({"easy": [0, 3]}, "query q: easy has what is no row of its images"),
        ({"easy": [-1]}, "query q: easy has what is no row of its images"),
        ({"easy": [True]}, "query q: easy has what is no row of its images"),
        ({"easy": [0], "junk": [0]}, "query q: an image is in its groups twice"),
        ({"box": [1, 2, 3]}, "query q: box [1, 2, 3] is not left, top, right, bottom"),
        ({"box": [3, 2, 1, 9]}, "is not left, top, right, bottom"),
        ({"box": [0, 0, 1, float("nan")]}, "is not left, top, right, bottom"),
        ({"box": [0, 0, 1, float("inf")]}, "is not left, top, right, bottom"),
        ({"box": [0, 0, 1, 10**400]}, "too large"),
        ({"image": ""}, "'' is no name of an image"),
        ({"hard": None}, "not iterable"),
    ],
)
def test_strange_values_are_refused(tmp_path, changes, message):
    query = {"image": "q", "box": None, "easy": [], "hard": [], "junk": []}
    whole = {"kind": "revisited", "images": ["a", "b", "c"], "queries": [query]}
    for name, value in changes.items():
        (whole if name in ("kind", "images") else query)[name] = value
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a ground truth (")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "[]", "list indices"),
        ("t.json", "{", "not JSON"),
        ("t.json", "{}", "it has no 'kind'"),
        ("t.json", "[" * 100_000, "recursion"),
        ("t.pkl", "", "pickle"),
        ("t.pkl", "no pickle", "opcode"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="not a ground truth") as caught:
        read(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pkl: no such file"):
        read(tmp_path / "none.pkl")


@pytest.fixture
def classic(tmp_path):
    """Two queries as Oxford5k's folder has them."""
    folder = tmp_path / "gt"
    folder.mkdir()
    texts = {
        "all_souls_1_query": "oxc1_all_souls_000013 136.5 34.1 648.5 955.7",
        "all_souls_1_good": "all_souls_000013\nall_souls_000026\n",
        "all_souls_1_ok": "all_souls_000090",
        "all_souls_1_junk": "christ_church_000001",
        "defense_2_query": "paris_defense_000605 1 2 3 4",
        "defense_2_good": "",
        "defense_2_ok": "paris_defense_000605",
        "defense_2_junk": "",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_the_older_benchmarks_folder_is_read(classic):
    truth = read(classic)
    assert truth.kind == "classic" and list(truth.setups) == ["classic"]
    named = [
        (q.image, q.box, {g: [truth.images[r] for r in q.groups[g]] for g in q.groups})
        for q in truth.queries
    ]
    assert named == [
        (
            "all_souls_000013",
            (136.5, 34.1, 648.5, 955.7),
            {
                "good": ["all_souls_000013", "all_souls_000026"],
                "ok": ["all_souls_000090"],
                "junk": ["christ_church_000001"],
            },
        ),
        (
            "paris_defense_000605",
            (1, 2, 3, 4),
            {"good": [], "ok": ["paris_defense_000605"], "junk": []},
        ),
    ]


def test_a_folder_that_lacks_a_table_is_refused(classic):
    (classic / "defense_2_junk.txt").unlink()
    with pytest.raises(FileNotFoundError, match="defense_2_junk.txt: no such file"):
        read(classic)


def test_a_folder_without_queries_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*_query.txt in it"):
        read(tmp_path)


def test_the_fingerprint_is_of_every_file_that_is_read(classic, tmp_path):
    before = ground_truth.fingerprint(classic)
    assert before == ground_truth.fingerprint(classic)
    (classic / "defense_2_junk.txt").write_text("all_souls_000026")
    assert ground_truth.fingerprint(classic) != before
    path = saved(tmp_path, PUBLISHED)
    assert len({ground_truth.fingerprint(path), before}) == 2
