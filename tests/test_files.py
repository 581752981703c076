import hashlib
import os
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


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as temporary:
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
    assert "File too large" in errors.splitlines()[-1]
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
