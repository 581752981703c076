import os
import time

import numpy as np
import pytest

from kit import checksums, files


def written(folder):
    """A folder of two files and their manifest."""
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(name.encode() * 1000)
    sums = checksums.compute_checksums(folder, ["a.bin", "b.bin"])
    about = {"rows": 3, "complete": True, "checksums": sums}
    return checksums.write_manifest(folder / "manifest.json", about)


def verify(folder, *names):
    about = checksums.read_manifest(folder / "manifest.json", "run it", ("rows",))
    checksums.verify_files(folder, about, "run it", names)


def test_what_was_written_is_verified(tmp_path):
    written(tmp_path)
    verify(tmp_path)
    assert (
        checksums.find_damaged(tmp_path, files.read_json(tmp_path / "manifest.json"))
        == []
    )


@pytest.mark.parametrize("at", [0, 2_500, 4_999])
def test_any_flipped_byte_of_a_file_is_refused_by_name(tmp_path, at):
    written(tmp_path)
    data = bytearray((tmp_path / "b.bin").read_bytes())
    data[at] ^= 1
    (tmp_path / "b.bin").write_bytes(data)
    with pytest.raises(checksums.Damaged, match="b.bin: damaged, .*; run it"):
        verify(tmp_path)
    verify(tmp_path, "a.bin")
    about = files.read_json(tmp_path / "manifest.json")
    assert checksums.find_damaged(tmp_path, about) == [tmp_path / "b.bin"]


def test_any_flipped_byte_of_a_manifest_is_refused_by_name(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            verify(tmp_path)
        except checksums.Damaged as error:
            assert str(error).startswith(str(path)), data[at - 5 : at + 5]
        else:  # white space for other white space
            assert files.read_json(path) == checksums.read_manifest(path, "")
            assert data[at : at + 1].isspace()


def test_a_missing_file_field_or_checksum_is_refused_by_name(tmp_path):
    path = written(tmp_path)
    with pytest.raises(checksums.Damaged, match="manifest.json: has no 'dim'; run it"):
        checksums.read_manifest(path, "run it", ("dim",))
    with pytest.raises(checksums.Damaged, match="no checksums"):
        verify(tmp_path, "c.bin")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(checksums.Damaged, match="a.bin: missing; run it"):
        verify(tmp_path)


def test_a_file_is_read_once_while_size_time_and_inode_stay(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    reads = []
    digest = checksums.hashlib.file_digest
    monkeypatch.setattr(
        checksums.hashlib, "file_digest", lambda *a: reads.append(1) or digest(*a)
    )
    first = checksums.compute_checksum(path)
    assert checksums.compute_checksum(path) == first and len(reads) == 1
    path.write_bytes(b"abd")
    os.utime(path, (2, 2))
    assert checksums.compute_checksum(path) != first and len(reads) == 2


def test_a_file_that_was_just_written_may_change_in_the_same_tick(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"abc", b"abd"):
        path.write_bytes(content)
        now = time.time_ns()
        os.utime(path, ns=(now, now // 10**9 * 10**9 + 10**10))
        found = checksums.compute_checksum(path)
    path.write_bytes(b"abc")
    os.utime(path, ns=(now, now // 10**9 * 10**9 + 10**10))
    assert checksums.compute_checksum(path) != found


@pytest.mark.parametrize("cut", [0, 10, 128, 1000])
def test_an_array_cut_short_is_refused_by_name(tmp_path, cut):
    np.save(tmp_path / "a.npy", np.ones((100, 8), np.float32))
    os.truncate(tmp_path / "a.npy", cut)
    with pytest.raises(checksums.Damaged, match="a.npy: cannot be read .*; run it"):
        checksums.open_array(tmp_path / "a.npy", "run it")
