import numpy as np
import pandas as pd
import pytest

from kit.answers import submission

QUERIES = np.array(["0000000000012345", "123456789012e345", "ffffffffffffffff"])
INDEX = np.array([f"{number:016x}" for number in range(200)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "submission.csv"


def written(path, **lines):
    """A submission with lines of our own."""
    path.parent.mkdir(exist_ok=True)
    rows = "".join(f"{query},{images}\n" for query, images in lines.items())
    path.write_text("id,images\n" + rows)
    return path


def refused(path, message, **ids):
    with pytest.raises(ValueError, match=message) as caught:
        submission.check(path, **({"query_ids": ["q", "r"], "index_ids": None} | ids))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# Writing and reading


def test_what_was_written_is_read(path):
    ranked = np.array([INDEX[[5, 2, 7]], INDEX[[0, 1, 2]], INDEX[[199, 0, 5]]])
    assert submission.write(path, QUERIES, ranked) == path
    read = submission.read(path)
    assert list(read) == QUERIES.tolist()
    assert list(read.values()) == ranked.tolist()


def test_the_file_is_what_kaggle_takes(path):
    submission.write(
        path, QUERIES[:2], np.array([["b" * 16, "a" * 16], ["c" * 16, ""]])
    )
    assert path.read_bytes() == (
        b"id,images\n"
        b"0000000000012345,bbbbbbbbbbbbbbbb aaaaaaaaaaaaaaaa\n"
        b"123456789012e345,cccccccccccccccc\n"
    )
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]


def test_empty_places_are_left_out(path):
    ranked = np.array([["a", "b", ""], ["", "", ""], ["", "c", ""]])
    submission.write(path, QUERIES, ranked)
    assert list(submission.read(path).values()) == [["a", "b"], [], ["c"]]


def test_words_that_mean_nothing_elsewhere_stay_ids(path):
    submission.write(path, np.array(["NA", "None"]), np.array([["nan"], ["null"]]))
    assert submission.read(path) == {"NA": ["nan"], "None": ["null"]}


def test_queries_and_rankings_of_different_number_are_refused(path):
    with pytest.raises(ValueError, match="^3 queries, but 2 rankings$"):
        submission.write(path, QUERIES, np.full((2, 4), "a"))
    assert not path.exists()


class Breaks:
    """A ranking whose disk is full when it is asked for."""

    def tolist(self):
        raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_the_old_file(path):
    submission.write(path, QUERIES[:1], np.array([["a"]]))
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        submission.write(path, QUERIES[:2], [np.array(["b"]), Breaks()])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]


def test_a_file_that_is_no_submission_is_refused(path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        submission.read(path)
    path.parent.mkdir()
    path.write_text("id,landmarks\nq,1 0.5\n")
    with pytest.raises(ValueError, match="no column images; it has id, landmarks"):
        submission.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="not a CSV file"):
        submission.read(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not a CSV file"):
        submission.read(path)


def test_a_query_that_stands_there_twice_is_refused(path):
    written(path, q="a")
    path.write_text(path.read_text() + "r,a\nq,b\n")
    with pytest.raises(ValueError, match="query 'q' stands there more than once"):
        submission.read(path)
    refused(path, "query 'q' stands there more than once")


# Checking


def test_a_good_submission_passes_with_its_number_of_queries(path):
    ranked = np.array([INDEX[start : start + 100] for start in (0, 50, 100)])
    submission.write(path, QUERIES, ranked)
    assert submission.check(path, QUERIES, INDEX) == 3
    assert submission.check(path, iter(QUERIES[::-1]), iter(INDEX.tolist())) == 3
    assert submission.check(path, QUERIES) == 3


def test_a_query_without_images_passes(path):
    assert submission.check(written(path, q="", r="a"), ["q", "r"], ["a"]) == 2


def test_a_missing_query_is_refused(path):
    refused(
        written(path, q="a"),
        r"query 'r' has no line \(2 missing\)$",
        query_ids=["s", "r", "q"],
    )


def test_a_line_that_is_no_query_is_refused(path):
    refused(
        written(path, q="a", r="a", z="a", y="a"), r"'y' is no query \(2 such lines\)$"
    )


def test_more_than_100_images_are_refused(path):
    assert submission.check(written(path, q=" ".join(INDEX[:100])), ["q"]) == 1
    refused(
        written(path, q="a", r=" ".join(INDEX[:101])),
        "query 'r' has 101 images, more than 100$",
    )


def test_an_image_twice_is_refused(path):
    refused(written(path, q="a b", r="a b a"), "query 'r' has an image twice$")


def test_an_image_that_is_not_in_the_index_is_refused(path):
    written(path, q="a b", r="b c z")
    assert submission.check(path, ["q", "r"]) == 2
    refused(
        path,
        "query 'r' answers 'c', which is not in the index$",
        index_ids=["a", "b", "z"],
    )


def test_another_competition_has_other_columns_and_fewer_images(tmp_path):
    form = submission.Form(("query", "answers"), 2)
    path = tmp_path / "submission.csv"
    ranked = np.array([["a" * 16, "b" * 16, ""]] * len(QUERIES))
    submission.write(path, QUERIES, ranked, QUERIES, form=form)
    head, first, *_ = path.read_text().splitlines()
    assert head == "query,answers"
    assert first == f"{QUERIES[0]},{'a' * 16} {'b' * 16}"
    assert submission.read(path, form)[QUERIES[0]] == ["a" * 16, "b" * 16]
    with pytest.raises(ValueError, match="no column id, images"):
        submission.read(path)
    longer = np.array([["a" * 16, "b" * 16, "c" * 16]] * len(QUERIES))
    with pytest.raises(ValueError, match="has 3 images, more than 2"):
        submission.write(path, QUERIES, longer, QUERIES, form=form)
    assert submission.check(path, QUERIES, form=form) == len(QUERIES)


# Landmarks


def predicted(*rows):
    return pd.DataFrame(rows, columns=["id", "landmark", "confidence"])


SOME = predicted(
    (QUERIES[0], "0020", 0.1 + 0.2), (QUERIES[2], "7", -31.0), (QUERIES[1], "", 0.0)
)


def test_landmarks_that_were_written_are_read(path):
    assert submission.write_landmarks(path, SOME, QUERIES, {"7", "0020"}) == path
    read = submission.read_landmarks(path)
    wanted = SOME.set_index("id").loc[QUERIES].reset_index()
    pd.testing.assert_frame_equal(read, wanted)


def test_a_file_of_landmarks_is_what_kaggle_takes(path):
    submission.write_landmarks(path, SOME.iloc[1:], QUERIES)
    assert path.read_bytes() == (
        b"id,landmarks\n0000000000012345,\n123456789012e345,\nffffffffffffffff,7 -31.0\n"
    )
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]


def test_nearly_equal_scores_stay_apart(path):
    close = [0.1, np.nextafter(0.1, 1), np.nextafter(0.1, 0)]
    rows = [(q, "7", c) for q, c in zip(QUERIES, close, strict=True)]
    submission.write_landmarks(path, predicted(*rows), QUERIES)
    assert submission.read_landmarks(path)["confidence"].tolist() == close


def test_columns_of_landmarks_may_have_other_names(path):
    form = submission.LANDMARKS._replace(columns=("query", "answer"))
    submission.write_landmarks(path, SOME, QUERIES, form=form)
    assert path.read_text().startswith("query,answer\n")
    assert submission.check_landmarks(path, QUERIES, form=form) == 3
    with pytest.raises(ValueError, match="no column id, landmarks"):
        submission.check_landmarks(path, QUERIES)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (predicted(("strange", "7", 1.0)), "strange is no query that is asked"),
        (
            predicted((QUERIES[0], "7", 1.0), (QUERIES[0], "8", 2.0)),
            "query '0000000000012345' has more than one prediction",
        ),
        (predicted((QUERIES[0], "9", 1.0)), "answers '9', which no reference shows"),
        (
            predicted((QUERIES[0], "7", np.nan)),
            "score 'nan' of query '0000000000012345'",
        ),
        (predicted((QUERIES[0], "7", -np.inf)), "score '-inf' of query"),
        (
            predicted((QUERIES[0], "7 8", 1.0)),
            "answers '7 8', which no reference shows",
        ),
    ],
)
def test_wrong_predictions_leave_the_old_file(path, made, words):
    submission.write_landmarks(path, SOME, QUERIES)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        submission.write_landmarks(path, made, QUERIES, {"7", "8"})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("q,7 0.5\n", "query 'r' has no line \\(1 missing\\)"),
        ("q,7 0.5\nr,\ns,\n", "'s' is no query \\(1 such lines\\)"),
        ("q,7 0.5\nr,\nq,\n", "query 'q' stands there more than once"),
        ("q,7\nr,\n", "query 'q' has '7', not one landmark and its score"),
        ("q,7 0.5 8 0.4\nr,\n", "not one landmark and its score"),
        ("q,7 high\nr,\n", "the score 'high' of query 'q' is no finite number"),
        ("q,7 inf\nr,\n", "the score 'inf' of query 'q' is no finite number"),
        ("q,8 0.5\nr,\n", "query 'q' answers '8', which no reference shows"),
    ],
)
def test_a_file_of_landmarks_is_refused_in_a_line(path, lines, words):
    path.parent.mkdir()
    path.write_text("id,landmarks\n" + lines)
    with pytest.raises(ValueError, match=words) as caught:
        submission.check_landmarks(path, ["q", "r"], {"7"})
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_nothing_predicted_is_a_valid_file(path):
    nothing = submission.no_landmarks(QUERIES)
    submission.write_landmarks(path, nothing, QUERIES, set())
    assert submission.check_landmarks(path, QUERIES, set()) == 3
    assert set(submission.read_landmarks(path)["landmark"]) == {""}


IDS = [f"{n:015x}f" for n in range(9, 30)]


@pytest.mark.parametrize(
    ("write", "shown"),
    [
        (lambda name: f"{name}.jpg", ".jpg"),
        (lambda name: f"index/{name}", "index/"),
        (str.upper, "9F"),
        (lambda name: name.lstrip("0"), "'9f'"),
    ],
    ids=["jpg", "path", "upper", "zeros"],
)
@pytest.mark.parametrize("column", ["queries", "images", "landmarks"])
def test_ids_of_another_form_must_be_named_with_those_that_are_right(
    path, column, write, shown
):
    path.parent.mkdir()
    queries = [write(name) if column == "queries" else name for name in IDS]
    answers = [name if column == "queries" else write(name) for name in IDS]
    more = " 0.5" if column == "landmarks" else ""
    rows = [f"{q},{a}{more}" for q, a in zip(queries, answers, strict=True)]
    head = "id,landmarks" if more else "id,images"
    path.write_text("\n".join([head, *rows]) + "\n")
    check = submission.check_landmarks if more else submission.check
    with pytest.raises(ValueError, match=r"of 21 ids are those of .*'0{13}") as refused:
        check(path, IDS, IDS)
    assert shown in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("mark", ["\ufeff", "\u200b", "\0", "\x1b", "\x7f"])
@pytest.mark.parametrize("row", ["q{},a", "q,a{}"])
def test_what_is_invisible_in_an_id_must_be_seen_in_the_message(path, mark, row):
    path.parent.mkdir()
    path.write_text(f"id,images\nr,a\n{row.format(mark)}\n", encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        submission.check(path, ["q", "r"], ["a"])
    said = str(refused.value)
    assert said.isprintable() and (repr(mark)[1:-1] in said or "NUL" in said), said
