"""Where in which tar every image lies: an index over the official `images_###.tar` files.

A tar counts as unpacked where it lies: member `0/1/2/012a.jpg` of `train/images_000.tar` is the
image `train/0/1/2/012a.jpg`. The index of a folder is `tar_index/` in it:
- `members-<hash>.npy`: (4, N) uint64, a column per image, sorted by the first two rows: the
  halves of its path's BLAKE2b-128; where its bytes begin; tar number * 2^32 + their count
- `tars.json`: path, size and time of every tar in the order of their numbers, and the checksum of
  the members; written last

`python -m kit.data.tars FOLDER` builds it or brings it up to date.
"""

import argparse
import hashlib
import logging
import posixpath
import sys
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import kit
from kit import checksums, files

log = logging.getLogger(__name__)

FOLDER = "tar_index"
BITS = 32  # of an image's size, under the number of its tar
LARGEST = (1 << BITS) - 1
# what tarfile raises on damaged headers: numbers that are none, too large or nested too deep
BROKEN = tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError
LINKS = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}


@dataclass(frozen=True)
class Tar:
    """One tar, and what tells whether it has changed since."""

    path: str  # from the folder
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Place:
    """The bytes of one image."""

    tar: int  # number in the index
    offset: int
    size: int


class Member(NamedTuple):
    """A file in a tar, or what claims to be one."""

    name: str  # in its one spelling, from the tar's folder
    offset: int
    size: int
    problem: str = ""  # why it is no plain file inside the folder


class Index:
    """The index of `folder`, mapped and not loaded: it weighs nothing in a forked worker."""

    def __init__(self, folder: Path) -> None:
        about = folder / FOLDER / "tars.json"
        advice = f"python -m kit.data.tars {folder} builds it"
        if not about.exists():
            raise FileNotFoundError(f"{folder}: no index of its tars; {advice}")
        try:
            found = checksums.read_manifest(about, "read the tars again")
            checksums.verify_files(about.parent, found, "read the tars again")
            self.tars = [Tar(**tar) for tar in found["tars"]]
            mapped = np.load(
                about.with_name(found["members"]), mmap_mode="r", allow_pickle=False
            )
            if mapped.dtype != np.uint64 or mapped.shape != (4, found["images"]):
                raise ValueError(f"{found['members']} is of another form")
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{about}: damaged ({error}); {advice} anew") from None
        self.columns = mapped.view(np.ndarray)

    def __len__(self) -> int:
        return self.columns.shape[1]

    def find(self, path: str) -> Place | None:
        """Where the image of that path lies; None where no tar has it."""
        first, second = _key(path)
        at = int(np.searchsorted(self.columns[0], np.uint64(first)))
        while at < len(self) and self.columns[0, at] == first:
            if self.columns[1, at] == second:
                offset, packed = (int(value) for value in self.columns[2:, at])
                return Place(packed >> BITS, offset, packed & LARGEST)
            at += 1
        return None


def tars_in(folder: Path) -> list[Tar]:
    """The tars of `folder` and of the folders in it, in the order of their paths."""
    found = sorted({*folder.glob("*.tar"), *folder.glob("*/*.tar")})
    return [facts(folder, path) for path in found if path.is_file()]


def facts(folder: Path, path: Path) -> Tar:
    found = path.stat()
    relative = path.relative_to(folder).as_posix()
    return Tar(relative, found.st_size, found.st_mtime_ns)


def index(folder: Path) -> Path:
    """Builds the index of the tars in `folder`, or brings it up to date; returns its folder.

    Only tars that are new or have another size or time are read; what an interrupted run has
    read is kept. A damaged tar is refused by name, and so is an image that two tars hold.
    """
    tars = tars_in(folder)
    if not tars:
        raise FileNotFoundError(f"{folder}: no *.tar there or one folder below")
    home = folder / FOLDER
    with files.lock(home):
        old = _existing(folder)
        if old and old.tars == tars:
            return home
        numbers = {tar: n for n, tar in enumerate(old.tars)} if old else {}
        parts = []
        for tar in tqdm(tars, "tars", disable=None):
            if old and tar in numbers:
                own = old.columns[3] >> np.uint64(BITS) == numbers[tar]
                parts.append(old.columns[:, own])
            else:
                parts.append(_part(folder, tar))
        columns = _merged(folder, tars, parts)
        _write(home, tars, columns)
    log.info("%s: %d images in %d tars", folder, columns.shape[1], len(tars))
    return home


def members(folder: Path, tar: Tar) -> Iterator[tuple[str, int, int]]:
    """Path, offset and bytes of every file in a plain tar; what is no such file is refused."""
    path, parent = folder / tar.path, posixpath.dirname(tar.path)
    for member in walk(path):
        if member.problem:
            raise ValueError(
                f"{path}: member {member.name} {member.problem}; pack it anew without"
            )
        yield posixpath.join(parent, member.name), member.offset, member.size


def walk(path: Path) -> Iterator[Member]:
    """Every member of a plain tar but its folders, in order; only the headers are read.

    A tar without its end mark is refused: cut short between two members it looks whole to
    many readers, and after a damaged header they stop without a word.
    """
    size, last, at = path.stat().st_size, "none", 0
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it collects them, and there may be millions
                if archive.offset <= at:  # a negative size: it would go round for ever
                    raise tarfile.ReadError(f"a header at byte {at} that leads back")
                at = archive.offset
                if member.isdir():
                    continue
                found = _member(member)
                # of a strange one the size need not be that of its data
                if (at if found.problem else found.offset + found.size) > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield found
                last = member.name
        with path.open("rb") as file:
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
    except BROKEN as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}), its last whole member is {last}; "
            "fetch it again"
        ) from None


def inside(path: str) -> bool:
    """Whether a path is in its one spelling and leads out of no folder."""
    first = path.split("/")[0]
    return path == posixpath.normpath(path) and first not in ("", ".", "..")


def _member(member: tarfile.TarInfo) -> Member:
    name, problem = posixpath.normpath(member.name), ""
    if not inside(name):
        problem = "leads out of the tar's folder"
    elif not member.isreg() or member.sparse is not None:
        problem = f"is {LINKS.get(member.type, 'no plain file')}"
    elif member.size > LARGEST:
        problem = f"has {member.size} bytes, too many for an image"
    if problem:  # under the name that it gave itself
        return Member(member.name, member.offset_data, member.size, problem)
    return Member(name, member.offset_data, member.size)


def _key(path: str) -> tuple[int, int]:
    """Equal for equal paths; among billions of others not once."""
    data = path.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def _existing(folder: Path) -> Index | None:
    try:
        return Index(folder)
    except (FileNotFoundError, ValueError):  # none yet, or damaged: all is read again
        return None


def _part(folder: Path, tar: Tar) -> np.ndarray:
    """(4, n) columns of one tar, in its own order; on disk until the index is whole."""
    name = files.fingerprint(asdict(tar))[:16]
    path = folder / FOLDER / "parts" / f"{name}.npy"
    if not path.exists():
        columns = array("Q")
        for member, offset, size in members(folder, tar):
            columns.extend((*_key(member), offset, size))
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(columns, np.uint64).reshape(-1, 4).T)
    return np.load(path, allow_pickle=False)


def _merged(
    folder: Path, tars: Sequence[Tar], parts: Sequence[np.ndarray]
) -> np.ndarray:
    """(4, N) columns of all tars, sorted; of one tar's equal paths the last, as unpacked."""
    columns = np.concatenate(parts, 1)
    owner = np.repeat(np.arange(len(tars)), [part.shape[1] for part in parts])
    columns[3] &= np.uint64(LARGEST)
    columns[3] |= owner.astype(np.uint64) << np.uint64(BITS)
    columns = columns[:, np.lexsort((columns[1], columns[0]))]
    same = (columns[:2, 1:] == columns[:2, :-1]).all(0)
    owner = columns[3] >> np.uint64(BITS)
    clash = np.flatnonzero(same & (owner[1:] != owner[:-1]))
    if len(clash):
        one, other = (tars[int(n)] for n in owner[clash[0] : clash[0] + 2])
        offset = int(columns[2, clash[0]])
        name = next(path for path, at, _ in members(folder, one) if at == offset)
        raise ValueError(
            f"{folder}: {name} is in {one.path} and in {other.path}; keep one of them"
        )
    return np.ascontiguousarray(columns[:, np.append(~same, True)[: len(owner)]])


def _write(home: Path, tars: Sequence[Tar], columns: np.ndarray) -> None:
    listed = [asdict(tar) for tar in tars]
    # a name of its own: the old pair stays valid until the JSON names the new file
    name = f"members-{files.fingerprint(listed)[:16]}.npy"
    with files.replacing(home / name) as temporary, temporary.open("wb") as file:
        np.save(file, columns)
    about = {"images": columns.shape[1], "members": name, "kit": kit.__version__}
    about["checksums"] = checksums.compute_checksums(home, [name])
    checksums.write_manifest(home / "tars.json", about | {"tars": listed})
    for path in [*home.glob("members-*.npy"), *home.glob("parts/*.npy")]:
        if path.name != name:
            path.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Index the tars of a data folder.")
    parser.add_argument("folder", type=Path, help="holds *.tar or train/*.tar, ...")
    folder = parser.parse_args(arguments).folder
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        index(folder)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
