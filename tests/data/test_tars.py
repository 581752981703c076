import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kit.data import tars
from kit.data.tars import Index, Tar, index, members

ROOT = Path(__file__).resolve().parents[2]
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT}
FORMS |= {"pax": tarfile.PAX_FORMAT}


def content(name, size=None):
    """Bytes of their own for every name."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.bytes(int(rng.integers(1, 2000)) if size is None else size)


def pack(path, files, form=tarfile.GNU_FORMAT, folders=()):
    """A tar in the official form: folders, and files of the given bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def with_member(path, **facts):
    """A tar of one plain file and one other member."""
    with tarfile.open(path, "w") as archive:
        good = tarfile.TarInfo("0/0/0/good.jpg")
        archive.addfile(good, io.BytesIO(b""))
        member = tarfile.TarInfo(facts.pop("name", "0/0/0/other.jpg"))
        for name, value in facts.items():
            setattr(member, name, value)
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def names(prefix, count=5):
    return [f"{n}/{n}/{n}/{prefix}{n:015d}.jpg" for n in range(count)]


@pytest.fixture
def official(tmp_path):
    """Three tars as GLDv2 has them; the bytes of every image by its path."""
    files = {}
    for split, letter, number in (
        ("train", "a", 0),
        ("train", "b", 1),
        ("test", "c", 0),
    ):
        own = {name: content(name) for name in names(letter)}
        pack(tmp_path / split / f"images_{number:03d}.tar", own, folders=("0", "0/0"))
        files |= {f"{split}/{name}": data for name, data in own.items()}
    return tmp_path, files


def look_up(folder, path):
    """The bytes of an image, by the index alone."""
    found = Index(folder)
    place = found.find(path)
    if place is None:
        return None
    data = (folder / found.tars[place.tar].path).read_bytes()
    return data[place.offset : place.offset + place.size]


def built(folder):
    """The index's file of members, as it is named now."""
    (path,) = (folder / "tar_index").glob("members-*.npy")
    return path


def test_every_image_is_found_where_its_bytes_are(official):
    folder, files = official
    assert index(folder) == folder / "tar_index"
    assert len(Index(folder)) == len(files) == 15
    for path, data in files.items():
        assert look_up(folder, path) == data
    for path in ("train/0/0/0/none.jpg", "0", "train/0/0", "", names("a")[0], "träin"):
        assert Index(folder).find(path) is None


@pytest.mark.parametrize("form", FORMS)
def test_long_and_foreign_names_are_found(tmp_path, form):
    long = "/".join(["folder" * 8] * (2 if form == "ustar" else 9)) + "/x.jpg"
    other = "ü/schön.jpg" if form == "ustar" else f"{'ü' * 90}/{'ö' * 90}.jpg"
    files = {name: content(name) for name in (long, other, "plain.jpg", "./dot.jpg")}
    pack(tmp_path / "images_000.tar", files, FORMS[form])
    index(tmp_path)
    for name, data in files.items():
        assert look_up(tmp_path, name.removeprefix("./")) == data


def test_tars_of_other_writers_are_read(official):
    folder, _ = official
    source = folder / "files"
    for name in ["x/1.jpg", f"x/{'long' * 15}/{'name' * 15}.jpg", "y/empty.jpg"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content(name, 0 if "empty" in name else None))
    for form in ("gnu", "posix", "ustar"):
        path = folder / f"{form}.tar"
        command = ["tar", f"--format={form}", "-cf", path, "-C", source]
        subprocess.run([*command, f"--transform=s,^,{form}/,", "x", "y"], check=True)
    index(folder)
    for form in ("gnu", "posix", "ustar"):
        for path in source.rglob("*.jpg"):
            name = f"{form}/{path.relative_to(source).as_posix()}"
            assert look_up(folder, name) == path.read_bytes()


def test_the_last_member_of_a_name_counts_as_when_unpacked(tmp_path):
    path = pack(tmp_path / "images.tar", {"a.jpg": b"first", "b.jpg": b"other"})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = 6
        archive.addfile(member, io.BytesIO(b"second"))
    index(tmp_path)
    assert look_up(tmp_path, "a.jpg") == b"second"
    assert look_up(tmp_path, "b.jpg") == b"other"
    assert len(Index(tmp_path)) == 2


def test_an_image_in_two_tars_is_refused_by_name(official):
    folder, _ = official
    pack(folder / "train/images_002.tar", {"new.jpg": b"1", names("b")[3]: b"2"})
    with pytest.raises(ValueError) as error:
        index(folder)
    assert str(error.value) == (
        f"{folder}: train/{names('b')[3]} is in train/images_001.tar and in "
        "train/images_002.tar; keep one of them"
    )


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"name": "/etc/passwd"}, "leads out of the tar's folder"),
        ({"name": "../x.jpg"}, "leads out of the tar's folder"),
        ({"name": "0/../../x.jpg"}, "leads out of the tar's folder"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc"}, "is a symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "0/0/0/good.jpg"}, "is a hard link"),
        ({"type": tarfile.CHRTYPE}, "is no plain file"),
        ({"type": tarfile.FIFOTYPE}, "is no plain file"),
    ],
)
def test_a_member_that_is_no_plain_file_inside_is_refused(tmp_path, facts, problem):
    path = with_member(tmp_path / "images.tar", **facts)
    with pytest.raises(ValueError) as error:
        index(tmp_path)
    name = facts.get("name", "0/0/0/other.jpg")
    assert str(error.value).startswith(f"{path}: member {name} {problem}")
    assert not (tmp_path / "tar_index" / "tars.json").exists()


def test_a_sparse_member_is_refused(tmp_path):
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    command = ["tar", "--sparse", "-C", tmp_path, "-cf", tmp_path / "a.tar"]
    subprocess.run([*command, "holes.jpg"], check=True)
    with pytest.raises(ValueError, match="member holes.jpg is no plain file"):
        index(tmp_path)


def test_a_tar_cut_short_anywhere_is_refused_with_its_last_whole_member(tmp_path):
    files = {name: content(name, 700) for name in names("a", 3)}
    path = pack(tmp_path / "images.tar", files, tarfile.PAX_FORMAT)
    data, tar = path.read_bytes(), tars.facts(tmp_path, path)
    ends = [offset + size for _, offset, size in members(tmp_path, tar)]
    last = -(-ends[-1] // 512) * 512
    cuts = {1, 511, 512, 513, ends[0] - 1, ends[0], ends[1] + 400, last, last + 511}
    for length in sorted({*cuts, *range(600, last, 331), 1 + ends[2]}):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError) as error:
            index(tmp_path)
        whole = sum(end <= length for end in ends)
        name = [*names("a", 3)][whole - 1] if whole else "none"
        message = str(error.value)
        assert message.startswith(f"{path}: damaged or cut short (")
        assert message.endswith(f"its last whole member is {name}; fetch it again")
    path.write_bytes(data[: last + 512])
    index(tmp_path)


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_damaged_header_is_refused_and_does_not_end_the_tar(tmp_path, member):
    files = {name: content(name, 700) for name in names("a", 3)}
    path = pack(tmp_path / "images.tar", files)
    data = bytearray(path.read_bytes())
    data[member * 1536 + 3] ^= 1  # a header and two blocks each
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError) as error:
        index(tmp_path)
    name = names("a", 3)[member - 1] if member else "none"
    assert f"its last whole member is {name};" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" * 999])
def test_what_is_no_tar_is_refused(tmp_path, data):
    (tmp_path / "images_000.tar").write_bytes(data)
    with pytest.raises(ValueError, match="images_000.tar: damaged or cut short"):
        index(tmp_path)


def test_a_tar_without_images_is_fine(tmp_path):
    pack(tmp_path / "images.tar", {}, folders=("0", "0/0"))
    index(tmp_path)
    assert len(Index(tmp_path)) == 0 and Index(tmp_path).find("0") is None


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        index(tmp_path)
    assert str(error.value) == f"{tmp_path}: no *.tar there or one folder below"
    with pytest.raises(FileNotFoundError) as error:
        Index(tmp_path)
    command = f"python -m kit.data.tars {tmp_path} builds it"
    assert str(error.value) == f"{tmp_path}: no index of its tars; {command}"


def spoil(path):
    """Other bytes of the same size and time: whoever reads them again will see."""
    facts = path.stat()
    path.write_bytes(bytes(facts.st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_only_tars_that_changed_are_read_again(official):
    folder, files = official
    index(folder)
    first = built(folder).read_bytes()
    spoil(folder / "train/images_000.tar")
    spoil(folder / "train/images_001.tar")
    index(folder)  # nothing is new
    assert built(folder).read_bytes() == first
    new = {name: content(name) for name in names("d", 3)}
    pack(folder / "index/images_000.tar", new)  # takes number 0
    pack(folder / "test/images_000.tar", {"other.jpg": b"other"})
    index(folder)
    assert len(Index(folder)) == 3 + 10 + 1
    for name, data in new.items():
        assert look_up(folder, f"index/{name}") == data
    assert look_up(folder, "test/other.jpg") == b"other"
    assert Index(folder).find(f"test/{names('c')[0]}") is None
    for path in files:
        if path.startswith("train"):
            place = Index(folder).find(path)
            tar = Index(folder).tars[place.tar].path
            assert tar == f"train/images_00{int('b0' in path)}.tar"
    (folder / "train/images_000.tar").unlink()
    index(folder)
    assert len(Index(folder)) == 3 + 5 + 1


def test_a_tar_of_another_time_is_read_again(official):
    folder, _ = official
    index(folder)
    path = folder / "train/images_000.tar"
    spoil(path)
    os.utime(path, ns=(0, 1))
    index(folder)
    assert len(Index(folder)) == 10


def test_an_interrupted_run_goes_on_with_what_it_has_read(official):
    folder, _ = official
    bad = pack(folder / "train/images_002.tar", {"x.jpg": b"x"})
    whole = bad.read_bytes()
    bad.write_bytes(whole[:600])
    with pytest.raises(ValueError, match="images_002"):
        index(folder)
    with pytest.raises(FileNotFoundError):
        Index(folder)
    kept = sorted((folder / "tar_index/parts").iterdir())
    assert len(kept) == 3  # test, and two of train
    bad.write_bytes(whole)
    spoil(folder / "train/images_001.tar")
    index(folder)
    assert len(Index(folder)) == 16
    assert not any((folder / "tar_index/parts").iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda home: (home / "tars.json").write_text("{"),
        lambda home: (home / "tars.json").write_text("[]"),
        lambda home: built(home.parent).unlink(),
        lambda home: built(home.parent).write_bytes(
            built(home.parent).read_bytes()[:99]
        ),
        lambda home: np.save(built(home.parent), np.zeros((4, 3), np.uint64)),
        lambda home: np.save(built(home.parent), np.array([{}], object)),
    ],
)
def test_a_damaged_index_is_refused_and_built_anew(official, damage):
    folder, files = official
    index(folder)
    damage(folder / "tar_index")
    with pytest.raises(ValueError) as error:
        Index(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}/tar_index/tars.json: damaged (")
    assert message.endswith(f"python -m kit.data.tars {folder} builds it anew")
    index(folder)
    path = next(iter(files))
    assert look_up(folder, path) == files[path]


def test_the_index_is_the_same_whatever_was_there_before(official, tmp_path_factory):
    folder, _ = official
    late = folder / "train/images_001.tar"
    aside = late.rename(tmp_path_factory.mktemp("aside") / "tar")
    index(folder)
    aside.rename(late)
    index(folder)
    grown, about = np.load(built(folder)), (folder / "tar_index/tars.json").read_text()
    for path in (folder / "tar_index").glob("*.*"):
        path.unlink()
    index(folder)
    np.testing.assert_array_equal(np.load(built(folder)), grown)
    assert (folder / "tar_index/tars.json").read_text() == about
    assert (np.diff(grown[0].astype(object)) > 0).all()


def test_the_index_is_mapped_and_small(tmp_path):
    pack(tmp_path / "a.tar", {f"{n}.jpg": b"" for n in range(3000)})
    index(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "tar_index").glob("*.*"))
    assert size < 3000 * 200e6 / 4.1e6  # 200 MB for 4.1 million
    found = Index(tmp_path)
    assert isinstance(found.columns.base, np.memmap)
    assert not found.columns.flags.writeable


def test_paths_whose_first_halves_are_equal_are_told_apart(tmp_path, monkeypatch):
    exact = tars._key
    monkeypatch.setattr(tars, "_key", lambda path: (exact(path)[0] % 3, exact(path)[1]))
    files = {f"{n}.jpg": content(str(n)) for n in range(40)}
    pack(tmp_path / "a.tar", files)
    index(tmp_path)
    for name, data in files.items():
        assert look_up(tmp_path, name) == data
    assert Index(tmp_path).find("none.jpg") is None


def test_what_is_on_disk_says_what_it_was_made_of(official):
    folder, files = official
    index(folder)
    about = json.loads((folder / "tar_index/tars.json").read_text())
    assert about["images"] == len(files) and about["members"] == built(folder).name
    paths = ["test/images_000.tar", "train/images_000.tar", "train/images_001.tar"]
    assert [tar["path"] for tar in about["tars"]] == paths
    assert [Tar(**tar) for tar in about["tars"]] == tars.tars_in(folder)


def test_the_command_builds_the_index_or_says_why_not(official, tmp_path_factory):
    folder, _ = official
    command = [sys.executable, "-m", "kit.data.tars"]
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, folder], check=False, **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: 15 images in 3 tars\n"
    empty = tmp_path_factory.mktemp("empty")
    done = subprocess.run([*command, empty], check=False, **run)
    assert done.returncode == 1
    assert re.fullmatch(f"{empty}: no .* below\n", done.stderr)
