import cv2
import numpy as np
import pytest
import torch

from kit.answers.pictures import Pictures
from kit.data import lists, sources
from kit.rerank.local import verification


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


@pytest.fixture
def asked(monkeypatch):
    """How many pairs each verification was asked for."""
    counts, work = [], verification.shortlist_inliers

    def counted(rows, *given, **options):
        counts.append(int((rows >= 0).sum()))
        return work(rows, *given, **options)

    monkeypatch.setattr(verification, "shortlist_inliers", counted)
    return counts


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


def test_a_pair_is_verified_once_and_empty_places_are_no_evidence(data, asked):
    found = pictures(data)
    rows = torch.tensor([[2, 0, -1], [-1, 1, 2]])
    first = found.inliers("query", rows, "sift", 200)
    paths = found.lists["index"].rows["path"].tolist()
    owners = found.lists["query"].rows["path"].tolist()
    for query, places in enumerate(rows.tolist()):
        for place, row in enumerate(places):
            same = (
                row >= 0
                and paths[row] == owners[query].replace("q", "i", 1)[:-4] + "0.jpg"
            )
            assert (first[query, place] > 20) == same
    again = found.inliers("query", rows.flip(1), "sift", 200)
    assert torch.equal(again, first.flip(1)) and asked == [4]
    wider = found.inliers(
        "query", torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]]), "sift", 200
    )
    assert asked == [4, 4]
    assert torch.equal(wider[0, [1, 3]], first[0, :2])
    assert torch.equal(wider[1, 1:3], first[1, 1:])
    found.inliers("query", rows, "sift", 100)  # another side knows nothing of it
    assert asked == [4, 4, 4]


def test_a_pair_of_index_images_is_verified_once_both_ways_round(data, asked):
    found = pictures(data)
    paths = found.lists["index"].rows["path"].tolist()
    one, other = paths.index("ia0.jpg"), paths.index("ia1.jpg")
    rows = torch.full((4, 1), -1)
    rows[one] = other
    first = found.inliers("index", rows, "sift", 200)
    assert first[one, 0] > 20 and first.sum() == first[one, 0]
    back = torch.full((4, 2), -1)
    back[other] = torch.tensor([other, one])  # itself is no evidence
    again = found.inliers("index", back, "sift", 200)
    assert again[other].tolist() == [0, first[one, 0]] and asked == [1, 1]
