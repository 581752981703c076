import pytest

from kit.answers.metrics import folders


def written(tmp_path, *lines):
    path = tmp_path / "set.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def told(truth):
    return {
        query.image: (
            query.box,
            [truth.images[row] for row in query.groups["same"]],
            [truth.images[row] for row in query.groups["self"]],
        )
        for query in truth.queries
    }


def test_every_labelled_picture_asks_for_the_others_of_its_label(tmp_path):
    truth = folders.read(
        written(tmp_path, "path,label", "a/1.jpg,x", "2.jpg,y", "3.jpg,x", "4.jpg,")
    )
    assert truth.kind == "labels" and truth.images == [
        "a/1.jpg",
        "2.jpg",
        "3.jpg",
        "4.jpg",
    ]
    assert told(truth) == {
        "a/1.jpg": (None, ["3.jpg"], ["a/1.jpg"]),
        "2.jpg": (None, [], ["2.jpg"]),
        "3.jpg": (None, ["a/1.jpg"], ["3.jpg"]),
    }


def test_a_picture_may_only_ask_or_only_be_searched(tmp_path):
    truth = folders.read(
        written(
            tmp_path,
            "query,label,path",
            "0,x,1",
            "1,x,2",
            "both,x,3",
            ",x,4",
            "0,,5",
            "1,y,6",
        )
    )
    assert truth.images == ["1", "3", "4", "5"]
    assert told(truth) == {
        "2": (None, ["1", "3", "4"], []),
        "3": (None, ["1", "4"], ["3"]),
        "6": (None, [], []),
    }


def test_a_box_is_a_corner_and_two_sides(tmp_path):
    truth = folders.read(
        written(
            tmp_path, "path,label,query,x,y,w,h", "1,a,1,10,20.5,30,40", "2,a,1,,,,"
        )
    )
    assert [query.box for query in truth.queries] == [(10, 20.5, 40, 60.5), None]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path", "1"], "no column label"),
        (["path,label", "1,a", "1,b"], "1 stands there more than once"),
        (["path,label", "../1,a"], "line 2: '../1' leads out of the folder"),
        (["path,label", "1,a", "/etc/x,a"], "line 3: '/etc/x' leads out of the folder"),
        (["path,label", ",a"], "line 2: '' leads out of the folder"),
        (["path,label,query", "1,a,yes"], "line 2: query 'yes' is not 0, 1, both"),
        (["path,label,query", "1,,1"], "line 2 asks without a label"),
        (["path,label,query", "1,,both"], "line 2 asks without a label"),
        (["path,label,query", "1,a,0"], "no picture asks"),
        (["path,label,x,y", "1,a,1,1"], "a box has x, y, w and h; not all"),
        (["path,label,x,y,w,h", "1,a,1,1,one,1"], "box 1 1 one 1 is not four numbers"),
        (["path,label,x,y,w,h", "1,a,1,1,2,"], "line 2: box 1 1 2  is not four"),
        (["path,label,x,y,w,h", "1,a,1,1,0,1"], "line 2: box 1 1 0 1 is empty"),
        (["path,label,x,y,w,h", "1,a,1,1,1,-1"], "line 2: box 1 1 1 -1 is empty"),
        (["path,label,x,y,w,h", "1,a,nan,1,1,1"], "line 2: box nan 1 1 1 is empty"),
        (["path,label,x,y,w,h", "1,a,1,1,inf,1"], "line 2: box 1 1 inf 1 is empty"),
    ],
)
def test_a_table_that_says_something_else_is_refused_in_one_line(
    tmp_path, lines, message
):
    with pytest.raises(ValueError) as caught:
        folders.read(written(tmp_path, *lines))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "set.csv"))
