import csv
import errno
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kit import files
from kit.data import lists, shards, sources, tables, tars
from kit.data.download import batch, official, run, unpack
from kit.data.download.order import Order, numbers
from kit.data.images import decode
from kit.data.readers import Folder, Tars, UnreadableImage, open_reader
from tests.gldv2_stub import (
    COUNTS,
    Fault,
    Stub,
    offered,
    pack,
    put,
    write_official,
)

ROOT = Path(__file__).resolve().parents[3]
CODES = ["FR", "JP", "NA", "XK", "OTHER"]
KINDS = ["tars", "images", "shards"]
FIRST = "gl/train/images_000.tar"


def go(out, source, client, **facts):
    return run.run(Order(out, **{"jobs": 2} | facts), source, client, CODES)


def reasons(bad):
    return {error.url.split("/gl")[-1]: str(error) for error in bad}


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pictures(data):
    return sorted(p.relative_to(data).as_posix() for p in data.rglob("?/?/?/*.jpg"))


def tree(out):
    """Bytes by path, without the index of the tars, which knows their times."""
    kept = (p for p in out.rglob("*") if p.is_file() and "tar_index" not in p.parts)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in kept}


def listed(data, out):
    """The lists that notebook 00 would make."""
    facts = sources.read(data)
    return facts, lists.build(facts, data, out, sizes=False)


# --- what is there at the end -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_offered_comes_whole_and_is_read(
    kind, toy, source, client, tmp_path, server
):
    out = tmp_path / "out"
    assert go(out, source, client, kind=kind, side=48) == []
    reader = open_reader(out)
    assert isinstance(reader, Folder if kind == "images" else Tars)
    unreadable = {row["path"]: row["reason"] for row in table(out / "unreadable.csv")}
    for path in pictures(toy):
        expected = (toy / path).read_bytes()
        if kind != "shards":
            assert reader.read(path) == expected
        elif path in unreadable:
            assert not reader.exists(path)
            with pytest.raises(UnreadableImage):
                decode(expected, path)
        else:
            whole = shards.shrunk(decode(expected, path), 48)
            small = decode(reader.read(path), path)
            assert small.shape == whole.shape
            assert np.abs(small.astype(int) - whole).mean() < 8
    assert kind != "shards" or unreadable  # the toy set has some
    for place in source.tables:
        assert (out / place).read_bytes() == (toy / place).read_bytes()
    assert table(out / "bad.csv") == [] == table(out / "refused.csv")
    ours, _ = listed(out, tmp_path / "lists")
    theirs = sources.read(toy)
    assert ours.train.equals(theirs.train) and ours.index.equals(theirs.index)
    assert ours.notes == theirs.notes and list(ours.country) == list(theirs.country)
    left = {p.name for p in out.rglob("*.tar")}
    named = {"tars": "images", "shards": "shard"}.get(kind)
    assert left == {f"{named}_00{n}.tar" for n in range(4) if named}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_asks_for_nothing(kind, source, client, tmp_path, server):
    go(tmp_path / "out", source, client, kind=kind)
    server.heard.clear()
    before = tree(tmp_path / "out")
    assert go(tmp_path / "out", source, client, kind=kind) == []
    assert server.heard == [] and tree(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["tars", "shards"])
def test_what_was_deleted_or_cut_comes_back(kind, source, client, tmp_path, server):
    out = tmp_path / "out"
    go(out, source, client, kind=kind)
    before = tree(out)
    first, second = sorted((out / "train").glob("*.tar"))[:2]
    first.unlink()
    if kind == "tars":
        second.write_bytes(second.read_bytes()[:-512])
    server.heard.clear()
    assert go(out, source, client, kind=kind) == [] and tree(out) == before
    asked = [path for _, path, _ in server.heard if path.endswith(".tar")]
    assert len(asked) == (2 if kind == "tars" else 1)


def test_shards_do_not_depend_on_the_number_of_jobs_and_threads(
    source, client, tmp_path
):
    for n, (jobs, workers) in enumerate(((1, 1), (4, 3))):
        order = Order(tmp_path / str(n), kind="shards", side=40, jobs=jobs)
        assert run.run(order, source, client, CODES, workers) == []
    assert tree(tmp_path / "0") == tree(tmp_path / "1")


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_no_more_originals_are_on_the_disk_than_jobs(
    kind, source, client, tmp_path, server
):
    out, seen = tmp_path / "out", []

    def count(path):
        if path.endswith(".tar"):
            names = {p.as_posix().split(".tar")[0] for p in out.rglob("images_*.tar*")}
            seen.append(len(names))

    server.on_get = count
    go(out, source, client, kind=kind, jobs=2)
    assert len(seen) == 7 and max(seen) <= 2
    assert not [*out.rglob("images_*")]


def test_some_tars_come_with_the_tables_of_what_is_in_them(
    toy, source, client, tmp_path
):
    out = tmp_path / "out"
    assert go(out, source, client, numbers=[0, 1]) == []
    dealt = {
        split: set(pictures(toy / split)[0::count])
        | set(pictures(toy / split)[1::count])
        for split, count in COUNTS.items()
    }
    facts, _ = listed(out, tmp_path / "lists")
    for split, rows in (("train", facts.train), ("index", facts.index)):
        assert {p.removeprefix(f"{split}/") for p in rows["path"]} == dealt[split]
    assert 0 < len(facts.train) < len(sources.read(toy).train)
    assert set(facts.clean["path"]) <= set(facts.train["path"])
    # with the other tars there they are the official ones again
    assert go(out, source, client) == []
    for place in source.tables:
        assert (out / place).read_bytes() == (toy / place).read_bytes()


@pytest.mark.slow
def test_a_split_that_is_named_twice_is_fetched_once(source, client, tmp_path, server):
    splits = ["test", "test"]
    assert go(tmp_path / "out", source, client, kind="shards", splits=splits) == []
    assert len(server.asked("gl/md5sum/test/md5.images_000.txt")) == 1


def test_the_reports_tell_of_earlier_calls_too(source, client, tmp_path):
    out = tmp_path / "out"
    for some in ({"splits": ["index"]}, {"numbers": [0]}, {"splits": ["test"]}):
        assert go(out, source, client, kind="shards", **some) == []
    records = [files.read_json(path) for path in out.glob("download/*_00?.json")]
    expected = {path for record in records for path in record["unreadable"]}
    told = {row["path"].split("/", 1)[1] for row in table(out / "unreadable.csv")}
    assert len(records) == 4 and told == expected != set()  # the toy set has some


def test_real_photos_come_as_they_are_but_smaller(photos, client, tmp_path):
    data, out = photos / "packages", tmp_path / "out"
    facts = write_official(tmp_path / "official.json")
    with Stub(offered(data)) as stub:
        source = official.read(facts, f"{stub.url}/gl", f"{stub.url}/gld")
        codes = [p.stem for p in (data / "train/country").glob("*.json")] or CODES
        order = Order(out, kind="shards", side=128)
        bad = [str(error) for error in run.run(order, source, client, codes)]
    assert [reason for reason in bad if "countries" not in reason] == []
    reader = open_reader(out)
    unreadable = {row["path"] for row in table(out / "unreadable.csv")}
    for path in pictures(data):
        assert reader.exists(path) == (path not in unreadable)
        try:
            size = decode((data / path).read_bytes(), path).shape[:2]
        except UnreadableImage:
            assert path in unreadable
        else:
            expected = shards.shrunk(np.empty((*size, 3), np.uint8), 128).shape
            assert decode(reader.read(path), path).shape == expected
    assert listed(out, tmp_path / "ours")[1] == listed(data, tmp_path / "theirs")[1]


@pytest.mark.parametrize(("kind", "seed"), [("shards", None), ("images", 7)])
def test_a_subset_is_of_whole_landmarks(kind, seed, toy, source, client, tmp_path):
    out, every = tmp_path / "out", sources.read(toy)
    order = {"kind": kind, "landmarks": 2, "seed": seed, "side": 4000}
    assert go(out, source, client, **order) == []
    facts, _ = listed(out, tmp_path / "lists")
    chosen = set(facts.clean["landmark_id"])
    assert len(chosen) == 2
    if seed is None:
        assert chosen == set(every.clean["landmark_id"].unique()[:2])
    bad = {row["path"] for row in table(out / "unreadable.csv")}
    wanted = every.train[every.train["landmark_id"].isin(chosen)]
    assert set(facts.train["path"]) == set(wanted["path"]) - bad
    labels = set(wanted["label"])
    wanted = every.index[every.index["label"].isin(labels)]
    assert len(wanted) and set(facts.index["id"]) == set(wanted["id"])
    answers = {
        row.id: set(row.images.split()) & set(wanted["id"])
        for row in every.solution.itertuples()
    }
    mine = dict(zip(facts.solution["id"], facts.solution["images"], strict=True))
    assert {name: set(ids.split()) for name, ids in mine.items()} == {
        name: ids for name, ids in answers.items() if ids
    }
    assert set(facts.query["id"]) == set(mine)
    reader = open_reader(out)
    for path in pictures(toy):
        kept = path.split("/")[-1][:16] in {
            *facts.train["id"],
            *facts.index["id"],
            *facts.query["id"],
        }
        assert reader.exists(path) == kept
    assert len([*(out / "metadata").rglob("*.csv")]) == len(source.tables)


def test_a_split_without_an_image_of_the_subset_is_left_out(
    source, client, tmp_path, server
):
    for name in ("index_image_to_landmark.csv", "index_label_to_category.csv"):
        head = server.files[f"gl/metadata/{name}"].split(b"\n")[0]
        server.files[f"gl/metadata/{name}"] = head + b"\nnone,0\n"
    out = tmp_path / "out"
    assert go(out, source, client, kind="shards", landmarks=2) == []
    assert not (out / "index").exists() and not (out / "test").exists()
    assert not [p for _, p, _ in server.heard if "index/images" in p]
    assert len(sources.read(out).train)


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_fault_the_result_is_the_same(
    kind, source, client, tmp_path, server
):
    go(tmp_path / "calm", source, client, kind=kind)
    short = Fault(keep=1000)
    server.faults |= {
        FIRST: [short, Fault(503), Fault(body=b"x" * 5000)],
        "gl/train/images_001.tar": [
            Fault(429, {"Retry-After": "0"}),
            Fault(whole=True),
        ],
        "gl/train/images_002.tar": [short, Fault(whole=True, keep=900), Fault(500)],
        "gl/index/images_000.tar": [Fault(chunked=True), short],
        "gl/test/images_000.tar": [Fault(keep=2000, hang=True)],
        "gl/metadata/train.csv": [Fault(keep=9), Fault(body=b"<html>login</html>")],
        "gl/md5sum/train/md5.images_000.txt": [Fault(503)],
        "gld/data/train/country/JP.json": [Fault(502), Fault(body=b"[{")],
    }
    assert go(tmp_path / "rough", source, client, kind=kind) == []
    assert tree(tmp_path / "rough") == tree(tmp_path / "calm")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_had_stands_in_the_bad_list_and_comes_later(
    kind, source, client, tmp_path, server
):
    out, good = tmp_path / "out", dict(server.files)
    del server.files["gl/train/images_001.tar"]
    del server.files["gl/md5sum/train/md5.images_002.txt"]
    server.files["gl/index/images_001.tar"] += b"x"
    server.files["gl/md5sum/test/md5.images_000.txt"] = b"none"
    server.faults[FIRST] = [Fault(503)] * 4
    bad = reasons(go(out, source, client, kind=kind))
    assert bad["/train/images_001.tar"] == "HTTP 404"
    assert bad["/md5sum/train/md5.images_002.txt"] == "HTTP 404"
    assert bad["/train/images_000.tar"] == "HTTP 503; 4 tries"
    assert "official is" in bad["/index/images_001.tar"]
    assert bad["/md5sum/test/md5.images_000.txt"] == "no MD5 in b'none'"
    assert len(bad) == 5 == len(table(out / "bad.csv"))
    assert {row["reason"] for row in table(out / "bad.csv")} == set(bad.values())
    assert (
        len(tables.read_csv(out / "train/train.csv", ("id",))) > 0
    )  # of what is there
    server.files |= good
    server.faults.clear()
    assert go(out, source, client, kind=kind) == []
    go(tmp_path / "calm", source, client, kind=kind)
    assert tree(out) == tree(tmp_path / "calm")


def test_without_a_table_no_tar_is_asked_for(source, client, tmp_path, server):
    del server.files["gl/metadata/index.csv"]
    bad = reasons(go(tmp_path / "out", source, client))
    assert bad == {"/metadata/index.csv": "HTTP 404"}
    assert not [p for _, p, _ in server.heard if p.endswith(".tar")]


def test_of_countries_some_have_no_file_but_not_all(source, client, tmp_path, server):
    out = tmp_path / "out"
    assert go(out, source, client, splits=["train"]) == []
    assert {p.stem for p in (out / "train/country").iterdir()} == {*CODES} - {"FR"}
    for name in [name for name in server.files if name.startswith("gld/")]:
        del server.files[name]
    (bad,) = go(tmp_path / "other", source, client, splits=["train"])
    assert "none of 5 countries" in str(bad)


def test_a_server_that_only_fails_is_left_alone(
    monkeypatch, source, client, tmp_path, server
):
    monkeypatch.setattr(batch, "GIVING_UP", 2)
    server.on_get = lambda path: time.sleep(0.05)
    for name in [name for name in server.files if name.endswith(".tar")]:
        del server.files[name]
    bad = reasons(go(tmp_path / "out", source, client, jobs=1))
    assert len(bad) == 7
    tried = [reason for reason in bad.values() if reason == "HTTP 404"]
    assert 2 <= len(tried) <= 4  # some may have begun
    assert "not tried: 2 before it failed in a row" in bad.values()


def test_failures_among_others_do_not_end_the_run(
    monkeypatch, source, client, tmp_path, server
):
    monkeypatch.setattr(batch, "GIVING_UP", 2)
    server.on_get = lambda path: time.sleep(0.05)
    for number in (0, 2):
        del server.files[f"gl/train/images_00{number}.tar"]
    bad = reasons(go(tmp_path / "out", source, client, jobs=1))
    assert set(bad) == {"/train/images_000.tar", "/train/images_002.tar"}


# --- what a tar may hold ------------------------------------------------------------------------


def hostile(good):
    """A tar with every kind of member that no tar of images should hold."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name, kind=tarfile.REGTYPE, link="", data=b""):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(data)
            archive.addfile(member, io.BytesIO(data))

        names = [*good]
        add("./" + names[0], data=good[names[0]])
        add("/kit_escaped.jpg", data=b"x")
        add("../escaped.jpg", data=b"x")
        add("0/../../../escaped.jpg", data=b"x")
        add("9/9/9/9990000000000000.jpg", tarfile.SYMTYPE, "/etc/passwd")
        add("9/9/9", tarfile.SYMTYPE, "/")
        add("9/9/9/9990000000000001.jpg", tarfile.LNKTYPE, "../../../../secret")
        add("9/9/9/9990000000000002.jpg", tarfile.CHRTYPE)
        add("9/9/9/9990000000000003.jpg", tarfile.FIFOTYPE)
        add("README.txt", data=b"read me")
        add("train/" + names[1], data=b"x")
        add("1/2/3/ffff000000000000.jpg", data=b"x")  # not where its id says
        add(names[1], data=good[names[1]])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_members_stay_in_the_tar(
    kind, toy, source, client, tmp_path, server, caplog
):
    caplog.set_level("INFO")
    paths = pictures(toy / "train")[0 :: COUNTS["train"]][:2]
    good = {path: (toy / "train" / path).read_bytes() for path in paths}
    put(server.files, "train", 0, hostile(good))
    outer = tmp_path / "outer"
    bad = go(outer / "out", source, client, kind=kind)
    assert [p.name for p in outer.iterdir()] == ["out"]
    assert not Path("/kit_escaped.jpg").exists()
    assert not [p for p in outer.rglob("*") if p.is_symlink() or "escaped" in p.name]
    if kind == "tars":  # read as it is, it would be refused whole
        assert list(reasons(bad)) == ["/train/images_000.tar"]
        assert "member /kit_escaped.jpg leads out of" in str(bad[0])
        assert not (outer / "out/train/images_000.tar").exists()
        return
    assert bad == []
    refused = {row["member"]: row["reason"] for row in table(outer / "out/refused.csv")}
    assert len(refused) == 8 and refused["9/9/9"] == "is a symbolic link"
    reader = open_reader(outer / "out")
    for path in paths:
        assert reader.exists(f"train/{path}")
    assert not reader.exists("train/README.txt")
    told = [r.getMessage() for r in caplog.records if r.name == run.__name__]
    count = len(pictures(toy)) - len(pictures(toy / "train")[0 :: COUNTS["train"]]) + 2
    bad = len(table(outer / "out/unreadable.csv"))
    some = f"{count - bad} images, {bad} unreadable ones" if bad else f"{count} images"
    assert f"7 tars: {some}, 8 refused members, 3 files that are no images" in told
    record = files.read_json(outer / "out/download/train_000.json")
    assert record["strange"] == 3 and record["images"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_tar_with_the_right_md5_is_bad(
    kind, source, client, tmp_path, server
):
    put(server.files, "train", 0, server.files[FIRST][:-2000])
    put(server.files, "train", 1, b"no tar at all" * 100)
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    put(server.files, "train", 2, empty.getvalue())
    bad = reasons(go(tmp_path / "out", source, client, kind=kind))
    assert len(bad) == 3
    assert "cut short" in bad["/train/images_000.tar"]
    assert "damaged" in bad["/train/images_001.tar"]
    assert "no member is an image" in bad["/train/images_002.tar"]
    assert not [*(tmp_path / "out").rglob("train/images_000*")]


def test_unreadable_images_are_told_apart_from_the_others(
    source, client, tmp_path, server
):
    buffer = io.BytesIO()
    Image.fromarray(np.full((60, 60, 3), 99, np.uint8)).save(buffer, "JPEG")
    good = buffer.getvalue()
    names = {f"a/a/a/aaa000000000000{n}.jpg": good for n in range(3)}
    names["a/a/a/aaa0000000000001.jpg"] = good[:-30]
    names["a/a/a/aaa0000000000002.jpg"] = b""
    put(server.files, "train", 0, pack(names, ""))
    go(tmp_path / "out", source, client, kind="shards", side=30)
    told = {r["path"]: r["reason"] for r in table(tmp_path / "out/unreadable.csv")}
    assert "cut short" in told["train/a/a/a/aaa0000000000001.jpg"]
    assert "empty" in told["train/a/a/a/aaa0000000000002.jpg"]
    shard = [m.name for m in tars.walk(tmp_path / "out/train/shard_000.tar")]
    assert shard == ["a/a/a/aaa0000000000000.jpg"]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"splits": ["train", "val"]}, "split val is not of train, index, test"),
        ({"kind": "zip"}, "tars, images, shards"),
        ({"kind": "shards", "side": 0}, "a side of 1 or more"),
        ({"jobs": 0}, "jobs 0"),
        ({"numbers": [900]}, "no such tar"),
        ({"landmarks": 5}, "extract them or pack shards"),
        ({"landmarks": 5, "kind": "images", "numbers": [1]}, "not both"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(
    facts, words, source, client, tmp_path, server
):
    with pytest.raises(ValueError, match=words):
        go(tmp_path / "out", source, client, **facts)
    assert not (tmp_path / "out").exists() and server.heard == []


def test_a_subset_larger_than_train_is_refused(source, client, tmp_path):
    with pytest.raises(ValueError, match="train has 7"):
        go(tmp_path / "out", source, client, kind="images", landmarks=100)


def test_a_folder_with_other_settings_is_refused(source, client, tmp_path):
    go(tmp_path / "out", source, client, kind="shards", side=40)
    for other in ({"side": 41}, {"kind": "images"}, {"landmarks": 1}):
        with pytest.raises(ValueError, match="give another folder"):
            go(
                tmp_path / "out",
                source,
                client,
                **{"kind": "shards", "side": 40} | other,
            )


def test_a_disk_that_is_too_small_is_said_before_any_tar(
    monkeypatch, source, client, tmp_path, server
):
    monkeypatch.setattr(run.forecast, "free_bytes", lambda path: 500_000)
    with pytest.raises(
        ValueError, match=r"about 0.0 GB are needed and 0.0 GB are free"
    ):
        go(tmp_path / "out", source, client)
    assert not [p for _, p, _ in server.heard if p.endswith(".tar")]


@pytest.mark.parametrize("kind", ["tars", "shards"])
def test_what_came_before_needs_no_more_room(
    kind, monkeypatch, source, client, tmp_path, server
):
    out, order = tmp_path / "out", {"kind": kind, "splits": ["test"]}
    size = len(server.files["gl/test/images_000.tar"])
    server.faults["gl/test/images_000.tar"] = [Fault(keep=size // 8)] * 4
    assert len(go(out, source, client, **order)) == 1
    # 100,000 bytes and as many to shrink are expected, and a half of one has come
    need = (1 if kind == "tars" else 1 + (512 / 600) ** 2) * 100_000 - size // 8 * 4
    for free, enough in ((need - 9, False), (need + 9, True)):
        monkeypatch.setattr(run.forecast, "free_bytes", lambda path, free=free: free)
        if enough:
            assert go(out, source, client, **order) == []
            continue
        with pytest.raises(ValueError, match="are needed"):
            go(out, source, client, **order)


def test_a_full_disk_ends_everything_at_once(monkeypatch, source, client, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unpack, "extract", full)
    with pytest.raises(OSError) as caught:
        go(tmp_path / "out", source, client, kind="images")
    assert caught.value.errno == errno.ENOSPC and client.stop.is_set()


def test_numbers_are_read_from_spans():
    assert numbers("0-3,9,2-4") == [0, 1, 2, 3, 4, 9]
    for text in ("", "a", "3-", "1..3", "-1"):
        with pytest.raises(ValueError, match="0-9,20"):
            numbers(text)


def test_a_file_of_facts_in_another_form_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"files": {}}')
    with pytest.raises(ValueError, match="not in the form of gldv2.json"):
        official.read(tmp_path / "x.json")


def test_the_official_addresses_are_those_of_the_datasets_page():
    source = official.read(ROOT / "datasets_meta/gldv2.json")
    s3 = "https://s3.amazonaws.com/google-landmark"
    tar = official.Tar("index", 7)
    assert source.tar(tar) == f"{s3}/index/images_007.tar"
    assert source.md5(tar) == f"{s3}/md5sum/index/md5.images_007.txt"
    assert source.table("train/train.csv") == f"{s3}/metadata/train.csv"
    solution = "test/retrieval_solution_v2.1.csv"
    truth = f"{s3}/ground_truth/retrieval_solution_v2.1.csv"
    assert source.table(solution) == truth
    country = "https://storage.googleapis.com/gld-v2/data/train/country/NA.json"
    assert source.country("NA") == country
    assert [len(source.tars([split], None)) for split in official.SPLITS] == [
        500,
        100,
        20,
    ]


# --- as a command -------------------------------------------------------------------------------


def command(stub, out, facts, *more):
    return [
        *(sys.executable, ROOT / "scripts/download_gldv2.py", "--out", out),
        *("--host", f"{stub.url}/gl", "--country-host", f"{stub.url}/gld"),
        *("--official", facts, "--timeout", "5", *more),
    ]


def test_the_command_tells_what_it_costs_and_what_is_bad(tmp_path, server):
    facts, out = write_official(tmp_path / "official.json"), tmp_path / "out"
    dry = command(
        server, out, facts, "--dry-run", "--rate", "1", "--stream-resize", "60"
    )
    told = subprocess.run(dry, capture_output=True, text=True, check=True).stdout
    size = sum(len(d) for n, d in server.files.items() if n.endswith(".tar"))
    assert f"to fetch: {size / 1e9:,.1f} GB (7 sizes from the server)" in told
    assert f"{size / 1e6 / 3600:.1f} hours at 1 MB/s\n" in told
    assert not out.exists()
    del server.files["gl/train/images_001.tar"]
    more = ("--splits", "train", "--stream-resize", "60", "--jobs", "3")
    ended = subprocess.run(
        command(server, out, facts, *more), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert (
        last == f"1 files could not be had, see {out}/bad.csv; the same command goes on"
    )
    assert "Traceback" not in ended.stderr
    assert files.read_json(out / "download/settings.json")["side"] == 60


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--splits", "foo"), "split foo is not of train, index, test"),
        (("--stream-resize", "0"), "a side of 1 or more"),
        (("--rate", "-5"), "--rate is -5.0, not above 0"),
        (("--timeout", "nan"), "--timeout is nan, not above 0"),
        (("--jobs", "0"), "--jobs is 0, not above 0"),
        (("--gld-v1", "list.csv"), "what GLD-v1 costs is not known"),
    ],
)
def test_the_command_refuses_in_one_line_what_costs_nothing(more, words, tmp_path):
    (tmp_path / "list.csv").write_text("id,url,landmark_id\n")
    facts = write_official(tmp_path / "official.json")
    stub = SimpleNamespace(url="http://127.0.0.1:9")
    dry = command(stub, tmp_path / "out", facts, "--dry-run", *more)
    ended = subprocess.run(
        dry, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode and words in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--extract", "--stream-resize=40", "--jobs=3"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(kind, tmp_path, server):
    facts, kills = write_official(tmp_path / "official.json"), 0
    calm = command(server, tmp_path / "calm", facts, kind)
    subprocess.run(calm, check=True, capture_output=True)
    server.pace = 0.05
    rng = np.random.default_rng(0)
    for _ in range(8):
        server.heard.clear()
        going = subprocess.Popen(
            command(server, tmp_path / "out", facts, kind),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while going.poll() is None and not server.heard:
            time.sleep(0.01)
        try:
            going.wait(float(rng.uniform(0.02, 0.4)))
        except subprocess.TimeoutExpired:
            going.send_signal(signal.SIGKILL)
            going.wait()
            kills += 1
        for path in (tmp_path / "out").rglob("*.tar"):
            assert [*tars.walk(path)]  # or it is refused as cut
    assert kills >= 3
    server.pace = 0.0
    subprocess.run(
        command(server, tmp_path / "out", facts, kind), check=True, capture_output=True
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_an_interrupt_ends_it_within_seconds_and_it_goes_on(tmp_path, server):
    facts, out = write_official(tmp_path / "official.json"), tmp_path / "out"
    server.faults[FIRST] = [Fault(drip=0.001)]
    going = subprocess.Popen(
        command(server, out, facts, "--extract"), stderr=subprocess.PIPE, text=True
    )
    give_up = time.monotonic() + 60
    while not server.asked(FIRST) and time.monotonic() < give_up:
        time.sleep(0.01)
    going.send_signal(signal.SIGINT)
    _, told = going.communicate(timeout=30)
    assert going.returncode == 1
    assert told.splitlines()[-1] == "interrupted; the same command goes on"
    subprocess.run(
        command(server, out, facts, "--extract"), check=True, capture_output=True
    )
