"""Checksums of what one step writes and another reads, kept in sealed manifests.

A manifest is a JSON object beside the files that it describes:

    "checksums"   xxh3-128 by file name, of the files in the manifest's own folder
    "seal"        SHA-256 of all its other content, so that a changed manifest is noticed, too

A file is read once a process to verify it; that is remembered by its path, size, time and inode.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kit import files

log = logging.getLogger(__name__)

CHECKSUMS, SEAL = "checksums", "seal"
# a file that was written a moment ago may change again within the tick of the file system's clock
SETTLED_NS = 100_000_000
_remembered: dict[tuple[str, int, int, int], str] = {}


class Damaged(ValueError):
    """A file is not the one that its manifest describes."""


def identify(path: Path) -> list[int]:
    """Size, time and inode: while they stay, so does the content."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def compute_checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes; remembered by this process."""
    path = path.resolve()
    size, changed, inode = identify(path)
    key = (str(path), size, changed, inode)
    if key not in _remembered:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        if time.time_ns() - changed < SETTLED_NS:
            return found
        _remembered[key] = found
    return _remembered[key]


def compute_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What a manifest of `folder` says of these files."""
    return {name: compute_checksum(folder / name) for name in names}


def verify_files(
    folder: Path, manifest: Mapping[str, Any], repair: str, names: Iterable[str] = ()
) -> None:
    """Raise Damaged unless the files `names` of `folder` are those of its manifest.

    names: all that the manifest lists if none is given. repair: what makes them again, for the
    message.
    """
    listed = manifest.get(CHECKSUMS)
    if not isinstance(listed, dict) or not set(names) <= listed.keys():
        raise Damaged(f"{folder}: the manifest has no checksums; {repair}")
    for name in names or listed:
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path}: missing; {repair}")
        if compute_checksum(path) != listed[name]:
            raise Damaged(f"{path}: damaged, or of something else; {repair}")


def write_manifest(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a JSON object with its seal."""
    value = json.loads(json.dumps(value))  # as it will be read
    value.pop(SEAL, None)
    return files.write_json(path, value | {SEAL: _seal(value)})


def read_manifest(
    path: Path, repair: str, needed: Iterable[str] = ()
) -> dict[str, Any]:
    """A sealed JSON object; raise Damaged if it was changed or lacks a field of `needed`."""
    try:
        value = files.read_json(path)
    except ValueError as error:
        raise Damaged(f"{error}; {repair}") from None
    if not isinstance(value, dict) or value.get(SEAL) != _seal(value):
        raise Damaged(f"{path}: damaged, changed by hand, or without a seal; {repair}")
    for name in needed:
        if name not in value:
            raise Damaged(f"{path}: has no {name!r}; {repair}")
    return value


def find_manifest(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest, or {} where there is none or, with a warning, a damaged one."""
    try:
        return read_manifest(path, "made again", needed) if path.exists() else {}
    except Damaged as error:
        log.warning("%s", error)
        return {}


def find_damaged(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The files that a complete manifest lists and that are others now, each with a warning."""
    found = []
    for name in manifest.get(CHECKSUMS, {}) if manifest.get("complete") else ():
        try:
            verify_files(folder, manifest, "made again", [name])
        except Damaged as error:
            log.warning("%s", error)
            found.append(folder / name)
    return found


def is_resumable(folder: Path, wanted: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether what is in `folder` can be kept: its manifest says all that is `wanted`, and its
    .npy files `names` are whole.

    The last of them marks what is done, and may differ: what lost its mark is made again. False with a warning where something is damaged: then all of it is to be made again.
    """
    about = find_manifest(folder / "manifest.json", ("complete",))
    if not about or not wanted.items() <= about.items():
        return False
    try:
        if about["complete"]:
            verify_files(folder, about, "made again", names[:-1])
        for name in names:
            open_array(folder / name, "made again")
    except Damaged as error:
        log.warning("%s", error)
        return False
    return True


def open_array(path: Path, repair: str) -> np.ndarray:
    """An .npy file, memory-mapped for reading; raise Damaged where it is cut short or none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise Damaged(f"{path}: cannot be read ({error}); {repair}") from None


def _seal(value: Mapping[str, Any]) -> str:
    return files.fingerprint({name: value[name] for name in value if name != SEAL})
