import json
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from kit import checksums, files
from kit.answers import audit
from kit.data import exclusions, lists, sources
from kit.data.images import read
from kit.data.sources import official
from kit.features import store
from tests.answers.scenes import unit
from tests.data.test_perceptual import jpeg, picture

ROOT = Path(__file__).resolve().parents[2]
NAMES = ROOT / "datasets_meta" / "roxford_rparis.json"
WIKI = "http://commons.wikimedia.org/wiki/Category:"
# of train, and what they are copies of
COPIES = {
    "aaaa000000000001": ("index", "bbbb000000000004"),  # landmark 99
    "aaaa000000000005": ("index", "99999999e9999999"),  # landmark 10 here
    "0000000000012345": ("test", "cccc000000000003"),  # landmark 30
    "123456789012e345": ("test", "0000000000054321"),  # landmark 10
}


def place(data, split, name):
    return data / split / name[0] / name[1] / name[2] / f"{name}.jpg"


@pytest.fixture
def data(gldv2):
    """The small folder with pictures for its images, some of them the same in two lists."""
    for number, path in enumerate(sorted(gldv2.rglob("*.jpg"))):
        path.write_bytes(jpeg(picture(number, 300, 400)))
    for name, (split, other) in COPIES.items():
        image = read(place(gldv2, split, other))
        small = cv2.resize(image, (200, 150), interpolation=cv2.INTER_AREA)
        place(gldv2, "train", name).write_bytes(jpeg(small, 60))
    place(gldv2, "train", "aaaa000000000008").write_bytes(b"")
    path = gldv2 / "train" / "train_label_to_category.csv"
    text = path.read_text().replace("Lighthouse", "Radcliffe_Camera_(Oxford)")
    text = text.replace(f"99,{WIKI}Pont_Neuf", f"99,{WIKI}Tour_Eiffel_from_Passy")
    path.write_text(text)
    return gldv2


@pytest.fixture
def folder(data, tmp_path):
    lists.build(official(data), data, tmp_path / "lists", sizes=False)
    return tmp_path / "lists"


@pytest.fixture
def job(data, folder, tmp_path):
    return audit.Audit(folder, data, tmp_path / "hashes", names=NAMES)


@pytest.fixture
def features(folder, tmp_path):
    """Features in which other images are near: aaaa...6 and two images of the index."""
    near = ("aaaa000000000006", "bbbb000000000001", "bbbb000000000007")
    for seed, name in enumerate(("full", "query", "index")):
        listed = lists.load(folder, name)
        vectors = unit(len(listed), 32, seed)
        for row, one in enumerate(listed.ids):
            if one in near:
                vectors[row] = unit(1, 32, 99)[0]
        about = {
            "model": {"name": "clean", "hash": "m" * 64},
            "list": {"name": name, "hash": listed.hash},
        }
        out = tmp_path / "features" / "clean" / name
        store.create(out, listed.ids, 32, 512, about)
        store.Writer(out).write(0, vectors)
        store.finish(out)
    return tmp_path / "features" / "clean"


def findings(result):
    return {
        each.what: (each.pairs, each.images, each.landmarks, len(each.excluded))
        for each in result.findings
    }


def excluded(result):
    return {row.id: row for each in result.findings for row in each.excluded}


def test_copies_in_other_lists_are_found_by_their_hashes(job):
    result = audit.run(job)
    found = findings(result)
    assert found["near-duplicates of query (perceptual hash, 6 bits)"] == (2, 2, 2, 2)
    assert found["near-duplicates of index (perceptual hash, 6 bits)"] == (2, 2, 2, 2)
    assert {one: row.of for one, row in excluded(result).items()} == {
        one: other for one, (_, other) in COPIES.items()
    }
    assert {one: row.reason for one, row in excluded(result).items()} == {
        one: f"near-duplicate of {'query' if split == 'test' else split}"
        for one, (split, _) in COPIES.items()
    }
    counts = {"new": 0, "hashed": 9, "flat": 0, "unreadable": 2}
    assert result.about["hashed"]["full"] == counts


def test_near_images_are_found_by_their_features_too(job, features):
    result = audit.run(replace(job, features=features))
    found = findings(result)
    how = "features of clean, cosine 0.95"
    assert found[f"near-duplicates of index ({how})"] == (2, 1, 1, 1)
    assert found[f"near-duplicates of query ({how})"] == (0, 0, 0, 0)
    assert excluded(result)["aaaa000000000006"].of == "bbbb000000000001"
    assert len(excluded(result)) == 5
    assert result.about["features"] == {"name": "clean", "hash": "m" * 64}
    assert result.about["least"] == 0.95


def test_landmarks_of_other_lists_are_counted_by_label(job, monkeypatch):
    monkeypatch.setattr(lists, "BLOCK", 3)
    found = findings(audit.run(job))
    # labels 0, 1, 2, 4 and, but for its new name, 6 of the index; 30, 10, 0020 and None
    assert found["landmarks of index, by label"] == (None, 7, 4, 0)
    assert found["landmarks of query, by label"] == (None, 7, 4, 0)


def test_landmarks_of_benchmarks_are_excluded_on_demand(job):
    result = audit.run(job)
    found = findings(result)
    assert found["landmarks of roxford, by name"] == (None, 1, 1, 0)
    assert found["landmarks of roxford, by a part of the name"] == (None, 0, 0, 0)
    assert found["landmarks of rparis, by name"] == (None, 0, 0, 0)
    assert found["landmarks of rparis, by a part of the name"] == (None, 2, 1, 0)
    result = audit.run(replace(job, labels=True))
    row = excluded(result)["aaaa000000000008"]
    assert row.reason == "landmark of roxford"
    assert row.of == "roxford/radcliffe_camera"
    assert len(excluded(result)) == 5
    told = result.about["benchmarks"]
    assert told["names"] == files.sha256(NAMES)
    assert [
        (each["landmark_id"], each["of"], each["whole"]) for each in told["matches"]
    ] == [
        ("99", "rparis/eiffel", False),
        ("20", "roxford/radcliffe_camera", True),
    ]


def test_without_benchmarks_no_names_are_read(job):
    result = audit.run(replace(job, benchmarks=(), names=Path("nowhere")))
    assert "benchmarks" not in result.about
    assert len(result.findings) == 4


def test_more_bits_find_a_cropped_copy(job, data):
    image = read(place(data, "index", "bbbb000000000002"))[8:-8, 12:-12]
    place(data, "train", "aaaa000000000007").write_bytes(jpeg(image))
    tight = excluded(audit.run(replace(job, bits=4)))
    wide = excluded(audit.run(replace(job, bits=16)))
    assert set(tight) <= set(COPIES)
    assert set(wide) == {*COPIES, "aaaa000000000007"}


def test_the_most_certain_pairs_are_told_by_path(job, features, monkeypatch):
    monkeypatch.setattr(audit, "SHOWN", 3)
    lines = audit.run(replace(job, features=features)).examples
    assert len(lines) == 4  # three by hash, one by features
    assert lines[3].split()[0] == "cosine"
    bits = [int(line.split()[0]) for line in lines[:3]]
    assert bits == sorted(bits)
    for line in lines[:3]:
        one, other = (Path(part).stem for part in line.split()[-2:])
        assert COPIES[one][1] == other
    assert lines[3].split()[2:] == [
        "train/a/a/a/aaaa000000000006.jpg",
        "index/b/b/b/bbbb000000000001.jpg",
    ]


def test_the_very_same_picture_is_the_most_certain(job, data, monkeypatch):
    monkeypatch.setattr(audit, "SHOWN", 1)
    whole = place(data, "index", "bbbb000000000002").read_bytes()
    place(data, "train", "aaaa000000000007").write_bytes(whole)
    image = read(place(data, "index", "bbbb000000000004"))[6:-6, 8:-8]
    place(data, "train", "aaaa000000000001").write_bytes(jpeg(image))
    place(data, "train", "aaaa000000000005").write_bytes(jpeg(picture(500)))
    result = audit.run(replace(job, bits=10, against=("index",)))
    assert list(excluded(result)) == ["aaaa000000000001", "aaaa000000000007"]
    (line,) = result.examples
    assert line.startswith("0 bits")
    assert "aaaa000000000007" in line


def test_images_without_a_label_are_of_no_landmark(job, data):
    whole = place(data, "index", "bbbb000000000002").read_bytes()
    place(data, "test", "cccc000000000004").write_bytes(whole)  # an ignored query
    found = audit.run(replace(job, train="all_holdout", against=("index",)))
    assert excluded(found)["cccc000000000004"].of == "bbbb000000000002"
    what = "near-duplicates of index (perceptual hash, 6 bits)"
    assert findings(found)[what] == (3, 3, 2, 3)


def test_a_list_that_holds_the_images_themselves_is_refused(job):
    with pytest.raises(ValueError, match=r"index_train holds 5 images of index itself"):
        audit.run(replace(job, train="index_train"))
    with pytest.raises(ValueError, match="index cannot be compared with itself"):
        replace(job, train="index")


def test_a_holdout_list_is_compared(job):
    assert len(excluded(audit.run(replace(job, train="index_train_holdout")))) == 4


@pytest.mark.parametrize("least", [0, -0.5, 1])
def test_a_cosine_that_says_nothing_is_refused(job, least):
    with pytest.raises(ValueError, match="not a cosine between 0 and 1"):
        replace(job, least=least)


def test_features_of_another_list_or_model_are_refused(job, features):
    wrong = files.read_json(features / "index" / "manifest.json")
    for kind in ("model", "list"):
        other = wrong | {kind: {"name": "another", "hash": "b" * 64}}
        checksums.write_manifest(features / "index" / "manifest.json", other)
        with pytest.raises(ValueError, match=f"features of {kind}"):
            audit.run(replace(job, features=features))
    with pytest.raises(FileNotFoundError, match="no features in"):
        audit.run(replace(job, features=features.parent / "none"))


def test_a_list_with_labels_of_its_own_is_compared_by_looks_alone(job, data):
    (data / "gld_v1").mkdir()
    (data / "gld_v1" / "train.csv").write_text(
        "id,url,landmark_id\neeee000000000001,x,30\neeee000000000002,x,10\n"
    )
    for name, other in (("1", "index/b/b/b/bbbb000000000004.jpg"), ("2", "")):
        path = place(data, "gld_v1", f"eeee00000000000{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((data / other).read_bytes() if other else jpeg(picture(77)))
    lists.build(official(data), data, job.lists, sizes=False)
    result = audit.run(replace(job, train="gld_v1", labels=True))
    assert list(excluded(result)) == ["eeee000000000001"]
    assert len(result.findings) == 2
    found = findings(audit.run(replace(job, against=("gld_v1",), benchmarks=())))
    assert list(found) == ["near-duplicates of gld_v1 (perceptual hash, 6 bits)"]


def test_the_table_is_aligned():
    lines = audit.table(
        [
            audit.Finding("near-duplicates of index", 1200, 31, 4500),
            audit.Finding("landmarks of query, by label", 7, 4),
        ]
    ).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["what", "pairs", "images", "landmarks", "excluded"]
    assert lines[1].split()[-4:] == ["4,500", "1,200", "31", "0"]
    assert lines[2].split()[-4:] == ["-", "7", "4", "0"]


def test_the_command_writes_a_list_that_lists_accept(job, features, tmp_path, capsys):
    out = tmp_path / "exclusions.csv"
    given = ["--lists", job.lists, "--data", job.data, "--out", out, "--names", NAMES]
    audit.main([*map(str, given), "--labels", "--features", str(features)])
    printed = capsys.readouterr().out
    reasons = exclusions.read(out)
    assert set(reasons) == {*COPIES, "aaaa000000000006", "aaaa000000000008"}
    assert f"{out}: 6 images" in printed
    assert "landmarks of rparis, by a part of the name" in printed
    assert "train/a/a/a/aaaa000000000001.jpg" in printed
    about = json.loads(out.with_suffix(".json").read_text())
    full = lists.find(job.lists, "full")
    assert about["train"] == {"name": "full", "hash": full.hash}
    assert about["bits"] == 6
    assert len(about["findings"]) == 10
    assert (tmp_path / "hashes" / "full" / "values.npy").exists()  # beside the lists


def test_what_was_excluded_once_stays_excluded(job, tmp_path):
    """Lists built without the leaks show none, and the next ones must not hold them."""
    out = tmp_path / "exclusions.csv"
    given = ["--lists", job.lists, "--data", job.data, "--out", out, "--names", NAMES]
    given = [*map(str, given), "--labels"]
    audit.main(given)
    before = exclusions.rows(out)
    facts = sources.read(job.data, excluded=exclusions.read(out))
    lists.build(facts, job.data, job.lists, sizes=False)
    audit.main(given)
    assert len(before) > 3 and exclusions.rows(out) == before
    given[5] = str(tmp_path / "other.csv")
    with pytest.raises(SystemExit, match="built without 5 excluded images; give --out"):
        audit.main(given)
    assert not (tmp_path / "other.csv").exists()


@pytest.mark.parametrize("train", ["c2x", "index_train_holdout"])
def test_a_list_cut_out_of_another_keeps_what_was_excluded(job, tmp_path, train):
    """What the list itself counts as dropped does not name what the list behind it has lost."""
    out = tmp_path / "exclusions.csv"
    given = ["--lists", job.lists, "--data", job.data, "--out", out, "--names", NAMES]
    given = [*map(str, given), "--labels"]
    audit.main(given)
    before = exclusions.rows(out)
    facts = sources.read(job.data, excluded=exclusions.read(out))
    lists.build(facts, job.data, job.lists, sizes=False)
    audit.main([*given, "--train", train])
    assert exclusions.rows(out)[: len(before)] == before


def test_the_same_audit_gives_the_same_bytes(job, tmp_path):
    outs = []
    for run in ("one", "two"):
        out = tmp_path / run / "exclusions.csv"
        given = ["--lists", job.lists, "--data", job.data, "--out", out]
        given += ["--names", NAMES, "--hashes", tmp_path / run / "hashes"]
        audit.main([*map(str, given), "--workers", "1" if run == "one" else "3"])
        outs.append(out.read_bytes() + out.with_suffix(".json").read_bytes())
    assert outs[0] == outs[1]


def test_the_command_refuses_in_one_line(job, tmp_path):
    given = ["--lists", job.lists, "--data", job.data, "--out", tmp_path / "x.csv"]
    with pytest.raises(SystemExit, match=r"^audit: no list index_val in .*$"):
        audit.main([*map(str, given), "--against", "index_val"])
    assert not (tmp_path / "x.csv").exists()
    given[-1] = tmp_path / "list.csv"
    given[-1].write_text("id,landmark_id\n")
    with pytest.raises(SystemExit, match="no exclusion list, it has no column reason"):
        audit.main([*map(str, given)])
    assert not (tmp_path / "hashes").exists()  # before anything was looked at


def test_no_real_photo_of_train_is_one_of_index_or_query(photos, tmp_path):
    data = photos / "packages"
    lists.build(official(data), data, tmp_path / "lists", sizes=False)
    given = audit.Audit(tmp_path / "lists", data, tmp_path / "hashes", names=NAMES)
    result = audit.run(given)
    assert excluded(result) == {}
    assert result.about["hashed"]["full"]["hashed"] > 1000
