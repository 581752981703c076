import cv2
import numpy as np
import pytest

from kit.answers.pictures import Pictures
from kit.data import lists, sources


@pytest.fixture
def data(tmp_path):
    """Two textures, each once as a query and twice in the index; one file is cut short."""
    random = np.random.default_rng(0)
    lines = ["path,label,group,split"]
    for label in "ab":
        texture = cv2.resize(random.integers(0, 256, (30, 40), np.uint8), (400, 300))
        for name in (f"q{label}", f"i{label}0", f"i{label}1"):
            cv2.imwrite(str(tmp_path / f"{name}.jpg"), texture)
            split = "query" if name[0] == "q" else "index"
            lines.append(f"{name}.jpg,{label},,{split}")
    lines.append("t.jpg,a,,train")
    cv2.imwrite(str(tmp_path / "t.jpg"), texture)
    cut = tmp_path / "ib1.jpg"
    cut.write_bytes(cut.read_bytes()[:500])
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(tmp_path / "table.csv", tmp_path)
    lists.build(facts, tmp_path, tmp_path / "lists", sizes=False)
    return tmp_path


def pictures(data, **options):
    named = {name: lists.load(data / "lists", name) for name in ("query", "index")}
    return Pictures(data, data / "local", named, **options)


def test_features_are_those_of_each_image_in_the_list_s_order(data):
    found = pictures(data)
    index = found("index", "sift", 200)
    paths = found.lists["index"].rows["path"].tolist()
    assert len(index) == len(paths) == 4
    for number, path in enumerate(paths):
        assert (len(index[number]) > 20) == (path != "ib1.jpg")
    assert index[0].size == (150, 200)
    assert len(found("query", "sift", 200)) == 2


def test_what_was_described_is_kept_by_backend_and_side(data, monkeypatch):
    first = pictures(data)("query", "sift", 200)
    folders = {path.parent for path in (data / "local").rglob("manifest.json")}
    assert folders == {data / "local" / "sift" / "200" / "query"}
    for path in data.glob("q*.jpg"):
        path.unlink()
    again = pictures(data)("query", "sift", 200)
    assert np.array_equal(first[1].descriptors, again[1].descriptors)


def test_other_processes_describe_the_same(data):
    alone = pictures(data)("index", "sift", 100)
    (data / "local").rename(data / "before")
    together = pictures(data, processes=2)("index", "sift", 100)
    for number in range(4):
        assert np.array_equal(alone[number].keypoints, together[number].keypoints)


def test_an_unknown_backend_is_refused(data):
    with pytest.raises(ValueError, match="no backend orb; there are sift, xfeat"):
        pictures(data)("query", "orb", 100)
