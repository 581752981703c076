import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kit import files

ROOT = Path(files.__file__).resolve().parents[1]


@pytest.fixture
def python():
    """Starts another Python with kit in reach; every one is over at the end."""
    started = []

    def start(code, *args):
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Whole or absent


def test_what_was_written_replaces_the_file_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("old", "new"):
        with files.replacing(path) as temporary:
            assert temporary.parent == path.parent  # so that the move is atomic
            temporary.write_text(text)
            assert path.exists() == (text == "new")
            if text == "new":
                assert path.read_text() == "old"
        assert path.read_text() == text
        assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, error, aside):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path, aside=aside) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), files.replacing(path):
        pass
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *args, real=real, name=name: (calls.append(name), real(*args)),
        )
    files.write_text(tmp_path / "a.txt", "new")
    assert calls[:2] == ["fsync", "replace"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path, python):
    path = tmp_path / "a.txt"
    path.write_text("old")
    writer = python(
        """
        import resource, sys
        from pathlib import Path
        from kit import files
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        files.write_text(Path(sys.argv[1]), "new" * 1000)
        """,
        path,
    )
    _, errors = writer.communicate(timeout=30)
    assert writer.returncode == 1
    last = errors.splitlines()[-1]
    assert f"{path}: not written: File too large" in last
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path, python):
    path = tmp_path / "a.txt"
    path.write_text("old")
    writer = python(
        """
        import sys, time
        from pathlib import Path
        from kit import files
        with files.replacing(Path(sys.argv[1])) as temporary:
            temporary.write_text("half of the n")
            print("written", flush=True)
            time.sleep(60)
        """,
        path,
    )
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    # a reader that looks for files by their ending never finds the half of one
    assert [each.name for each in tmp_path.glob("*.txt")] == ["a.txt"]
    with files.lock(tmp_path):
        assert names(tmp_path) == [".lock", "a.txt"]


def test_a_renamed_file_is_synced_with_its_folder(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(number: int) -> None:
        synced.append(os.fstat(number).st_ino)
        real(number)
        if len(synced) == 2:
            raise OSError(errno.EINVAL, "a disk that cannot")

    monkeypatch.setattr(os, "fsync", fsync)
    path = files.write_text(tmp_path / "a.txt", "new")
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]


# What the disk refuses


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM]
    + [errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ENOTDIR],
)
@pytest.mark.parametrize("where", ["mkdir", "open", "replace"])
def test_what_a_disk_refuses_names_the_file_and_leaves_the_old_one(
    tmp_path, monkeypatch, number, where
):
    path = files.write_text(tmp_path / "a.txt", "old")

    def refuse(first, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), first)

    kind = os if where == "replace" else Path
    with monkeypatch.context() as patch:
        patch.setattr(kind, where, refuse)
        with pytest.raises(OSError) as caught:
            files.write_text(path, "new")
    assert caught.value.errno == number
    assert type(caught.value) is type(OSError(number, ""))
    assert str(caught.value).startswith(f"{path}: not written: {os.strerror(number)}")
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_lock_names_the_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(OSError, match=re.escape(str(tmp_path))) as caught,
        files.lock(tmp_path),
    ):
        raise AssertionError("not reached")
    assert caught.value.errno == errno.EROFS and "[Errno" not in str(caught.value)


def test_an_error_of_another_file_keeps_its_words(tmp_path):
    path = tmp_path / "a.txt"
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "photo"))
    with pytest.raises(PermissionError) as caught, files.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert caught.value is error


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path):
    for name in ("a" * 255, "é" * 127, "a" * 251 + ".csv"):
        assert files.write_text(tmp_path / name, name).read_text() == name
    for name in ("a" * 256, "é" * 128):
        with pytest.raises(OSError, match="not written") as caught:
            files.write_text(tmp_path / name, name)
        assert caught.value.errno == errno.ENAMETOOLONG
    assert len(names(tmp_path)) == 3


WRITERS = """
import csv, io, resource, sys, tarfile
from pathlib import Path
import numpy as np, pandas as pd, torch
from kit import files
from kit.features import store
from kit.models.weights import write_weights
from kit.training import checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
zeros, folder = torch.zeros(300_000), Path(sys.argv[1])

def tar(path):
    with files.replacing(path) as part, tarfile.open(part, "w") as archive:
        member = tarfile.TarInfo("a")
        member.size = 300_000
        archive.addfile(member, io.BytesIO(bytes(300_000)))

def table(path):
    with files.replacing(path) as part:
        pd.DataFrame({"a": range(100_000)}).to_csv(part)

def lines(path):
    with files.replacing(path) as part, part.open("w") as file:
        csv.writer(file).writerows([i] for i in range(100_000))

writers = {
    "a.npy": lambda path: store._save(path, zeros.numpy()),
    "b.npy": lambda path: store.allocate(path, (300, 300), np.float32),
    "a.safetensors": lambda path: write_weights(path, {"a": zeros}),
    "resume/state.pt": lambda path: checkpoints.save_state(folder, "f", {"net": {"a": zeros}}),
    "a.tar": tar,
    "a.csv": table,
    "b.csv": lines,
    "a.json": lambda path: files.write_json(path, "a" * 300_000),
}
for name, write in writers.items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("old")
    try:
        write(path)
    except OSError as error:
        print(name, error, sep="|")
    assert path.read_text() == "old", path
"""


def test_every_kind_of_file_says_that_the_disk_is_full(tmp_path, python):
    out, errors = python(WRITERS, tmp_path).communicate(timeout=120)
    assert not errors
    said = dict(line.split("|", 1) for line in out.splitlines())
    wanted = {"a.safetensors": "1.2 MB", "resume/state.pt": "1.2 MB", "b.npy": "0.4 MB"}
    assert len(said) == 8
    for name, line in said.items():
        assert line.startswith(f"{tmp_path / name}: not written: File too large ("), (
            line
        )
        assert " MB free)" in line
        assert f"({wanted[name]} wanted" in line if name in wanted else True
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert left == set(said)


# What kills leave


def part(folder: Path, machine: str, pid: int, started: int, name: str = "a") -> Path:
    path = folder / f".{name}.{machine}-{pid}-{started}.part"
    path.write_text("half")
    return path


def test_only_temporary_files_of_ended_processes_are_swept(tmp_path, python):
    here, started = files._machine(), files._process(os.getpid())[1]
    ended = python("pass")
    ended.wait(30)
    deep = tmp_path / "resume"
    deep.mkdir()
    gone = [
        part(tmp_path, here, ended.pid, 5),
        part(deep, here, ended.pid, 5),
        part(tmp_path, here, os.getpid(), started + 1),  # its number was used again
        part(tmp_path, "0" * 8, 1, 1, "old"),
        tmp_path / ".by_an_older_version.123.part",
    ]
    gone[-1].write_text("half")
    folder = tmp_path / f".a.safetensors.{here}-{ended.pid}-5.part"
    folder.mkdir()
    (folder / ".tmpAbCdEf").write_text("half")
    for path in gone[-2:]:
        os.utime(path, (time.time() - 2 * files.DAY,) * 2)
    kept = [
        part(tmp_path, here, os.getpid(), started),
        part(deep, here, os.getpid(), started),
        part(tmp_path, "0" * 8, ended.pid, 5),  # of another machine, just now
        tmp_path / "tar.part",  # a download goes on with it
        tmp_path / ".part",
    ]
    for path in kept[-2:]:
        path.write_text("half")
    swept = files.sweep_parts(tmp_path)
    assert sorted(swept) == sorted([*gone, folder]) and not folder.exists()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert files.sweep_parts(tmp_path / "absent") == []


def test_a_sweep_that_is_not_deep_leaves_the_folders_in_it(tmp_path, python):
    ended = python("pass")
    ended.wait(30)
    (tmp_path / "deep").mkdir()
    above = part(tmp_path, files._machine(), ended.pid, 5)
    below = part(tmp_path / "deep", files._machine(), ended.pid, 5)
    assert files.sweep_parts(tmp_path, deep=False) == [above]
    assert below.exists()


def test_without_proc_a_process_is_told_by_its_number(tmp_path, python, monkeypatch):
    monkeypatch.setattr(files, "_process", lambda pid: None)
    ended = python("pass")
    ended.wait(30)
    gone = part(tmp_path, files._machine(), ended.pid, 0)
    kept = part(tmp_path, files._machine(), os.getpid(), 0)
    assert files.sweep_parts(tmp_path) == [gone] and kept.exists()


def test_a_file_that_is_being_written_is_not_swept(tmp_path, python):
    sweep = """
        import sys
        from pathlib import Path
        from kit import files
        with files.lock(Path(sys.argv[1])):
            pass
    """
    with files.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        process = python(sweep, tmp_path)
        assert process.wait(30) == 0
    assert (tmp_path / "a.txt").read_text() == "new"


def test_json_comes_back_as_it_was(tmp_path):
    value = {"é": [1, 2.5, None, True, "0000000000012345"], "a": {"b": []}}
    path = files.write_json(tmp_path / "a.json", value)
    assert path == tmp_path / "a.json"
    assert files.read_json(path) == value
    assert path.read_bytes().endswith(b"}\n")


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert files.read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


# Hashes


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")  # the example of FIPS 180-2
    assert files.sha256(path) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    path.write_bytes(bytes(range(256)) * 5000)
    assert files.sha256(path) == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    other = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert files.fingerprint(one) == files.fingerprint(other)


def test_a_fingerprint_is_the_hash_of_the_shortest_json():
    text = b'{"a":[1,"x"],"b":{"c":null,"d":0.5}}'
    value = {"b": {"d": 0.5, "c": None}, "a": (1, "x")}
    assert files.fingerprint(value) == hashlib.sha256(text).hexdigest()


def test_different_values_have_different_fingerprints():
    values = [1, "1", 1.5, None, "None", [], {}, [1], ["1"], {"a": 1}, {"a": [1]}, True]
    values += [[1, 2], [2, 1], {"a": {"b": 1}}, {"a": 1, "b": 1}, {"b": 1}]
    assert len({files.fingerprint(value) for value in values}) == len(values)


# Locks

HOLD = """
import sys, time
from pathlib import Path
from kit import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
TRY = """
import sys
from pathlib import Path
from kit import files
with files.lock(Path(sys.argv[1]), patience=float(sys.argv[2])):
    print("held")
"""


def attempt(python, folder, patience):
    """Whether a second process gets the lock, and what it says."""
    process = python(TRY, folder, patience)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode == 0) == (out == "held\n")
    return process.returncode == 0, errors


def test_a_lock_keeps_a_second_process_out(tmp_path, python):
    folder = tmp_path / "new" / "folder"
    with files.lock(folder):
        got, errors = attempt(python, folder, 0.1)
        assert not got
        assert errors.splitlines()[-1] == (
            f"RuntimeError: {folder}: another process is writing here; "
            "wait for it or end it"
        )
        assert attempt(python, tmp_path, 0.1)[0]  # another folder is free
    assert attempt(python, folder, 0.1)[0]


def test_a_lock_ends_with_an_error(tmp_path, python):
    with pytest.raises(KeyError), files.lock(tmp_path):
        raise KeyError
    assert attempt(python, tmp_path, 0.1)[0]


def test_a_lock_is_waited_for(tmp_path, python):
    holder = python(HOLD, tmp_path, 0.7)
    assert holder.stdout.readline() == "held\n"
    begun = time.monotonic()
    with files.lock(tmp_path, patience=20):
        assert 0.2 < time.monotonic() - begun < 15
        assert holder.wait(10) == 0


def test_a_lock_is_not_waited_for_longer_than_patience(tmp_path, python):
    holder = python(HOLD, tmp_path, 60)
    assert holder.stdout.readline() == "held\n"
    begun = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="another process is writing here"),
        files.lock(tmp_path, patience=0.3),
    ):
        pass
    assert 0.3 <= time.monotonic() - begun < 10


def test_a_lock_ends_with_a_killed_process(tmp_path, python):
    holder = python(HOLD, tmp_path, 60)
    assert holder.stdout.readline() == "held\n"
    assert not attempt(python, tmp_path, 0.1)[0]
    holder.send_signal(signal.SIGKILL)
    assert holder.wait(30) == -signal.SIGKILL
    assert attempt(python, tmp_path, 0.1)[0]
    with files.lock(tmp_path, patience=0.1):
        pass


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, name):
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, name), "refused")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with (
        pytest.raises(OSError, match=re.escape(f"{tmp_path / 'work'}: ")) as caught,
        files.lock(tmp_path / "work"),
    ):
        raise AssertionError("not reached")
    assert "another disk" in str(caught.value)
