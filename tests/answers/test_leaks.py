import pytest

from kit.answers.leaks import LeakError, refuse_leaks
from kit.data import lists, sources


@pytest.fixture
def made(tmp_path):
    """Lists of three train landmarks, an index of five images (one a distractor), three queries."""
    lines = ["path,label,split"]
    lines += [f"train/{n}.jpg,{'abc'[n % 3]},train" for n in range(6)]
    lines += [f"index/{n}.jpg,{label},index" for n, label in enumerate("abca")]
    lines += ["index/9.jpg,,index"]
    lines += [f"query/{n}.jpg,{label},query" for n, label in enumerate("abz")]
    for line in lines[1:]:
        path = tmp_path / "data" / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(tmp_path / "table.csv", tmp_path / "data")
    lists.build(facts, tmp_path / "data", tmp_path / "lists", sizes=False)
    return tmp_path / "lists"


def hashes(folder, *names):
    return {lists.load(folder, name).hash: name for name in names}


def test_holdout_lists_do_not_leak(made):
    seen = hashes(made, "clean", "c2x", "full", "index_train_holdout", "all_holdout")
    assert len(seen) >= 3
    assert refuse_leaks(made, lists.load(made, "index"), seen) == ""
    assert refuse_leaks(made, lists.load(made, "index"), {}) == ""


@pytest.mark.parametrize(
    ("name", "count"), [("index_train", 4), ("all", 6), ("index", 5), ("query", 2)]
)
def test_what_saw_the_index_or_a_query_is_refused(made, name, count):
    seen = hashes(made, "clean", name)
    message = f"^list {name} holds {count} validation queries or images of index; use a"
    with pytest.raises(LeakError, match=message) as caught:
        refuse_leaks(made, lists.load(made, "index"), seen)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_a_leak_that_is_asked_for_is_printed_beside_the_number(made):
    index, seen = lists.load(made, "index"), hashes(made, "index_train")
    warning = refuse_leaks(made, index, seen, optimistic=True)
    expected = "list index_train holds 4 validation queries or images of index"
    assert warning == f"  LEAKY ({expected})"
    assert refuse_leaks(made, index, hashes(made, "clean"), optimistic=True) == ""


def test_a_list_that_nobody_knows_counts_as_a_leak(made):
    index, seen = lists.load(made, "index"), {"0" * 64: "old"}
    with pytest.raises(LeakError, match="^list old is not one of those in"):
        refuse_leaks(made, index, seen)
    assert "LEAKY (list old is" in refuse_leaks(made, index, seen, optimistic=True)
