"""Where images are read from: files in a folder, or members of the tars in it.

`open_reader(root)` looks at what `root` holds. Readers are cheap to pickle and to fork, and any
number of threads may share one.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Protocol

from kit.data import tars


class UnreadableImage(Exception):
    """A file that is missing, empty, cut short or no image at all."""


class Reader(Protocol):
    """Bytes of images by the path that a list gives them."""

    root: Path

    def read(self, path: str) -> bytes:
        """Raises UnreadableImage where there is no such image or its bytes do not come."""

    def exists(self, path: str) -> bool: ...


def open_reader(root: Path) -> Reader:
    """The tars of `root` if they are indexed (kit.data.tars), else its files."""
    return Tars(root) if (root / tars.FOLDER / "tars.json").exists() else Folder(root)


def file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from None


class Folder:
    """Files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        try:
            return file_bytes(self.root / path)
        except UnreadableImage as error:
            if self._packed and not self.exists(path):
                raise UnreadableImage(f"{error}{self._packed}") from None
            raise

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    @cached_property
    def _packed(self) -> str:
        count = len(tars.tars_in(self.root))
        advice = f"python -m kit.data.tars {self.root}"
        return f" ({count} tars are there without an index: {advice})" if count else ""


class Tars:
    """Members of the indexed tars under `root`; a file counts only where no tar has its path.

    So a result does not depend on what somebody has unpacked beside the tars. A tar that has
    changed since it was indexed is an error that ends the run, not an unreadable image.
    """

    KEPT = 512  # descriptors that stay open; further tars are opened for each image

    def __init__(self, root: Path) -> None:
        self.root, self.index = root, tars.Index(root)
        self._descriptors: dict[int, int] = {}  # by number of the tar

    def __reduce__(self) -> tuple:
        return Tars, (self.root,)  # maps the index and opens the tars anew

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, path: str) -> bytes:
        place = self.index.find(path)
        if place is None:
            return self._file(path)
        tar = self.index.tars[place.tar]
        descriptor = self._open(place.tar)
        try:
            # by position: a fork or a thread moves nobody else's place in the file
            data = os.pread(descriptor, place.size, place.offset)
        except OSError as error:
            raise UnreadableImage(f"{path} in {tar.path}: {error.strerror}") from None
        finally:
            if self._descriptors.get(place.tar) != descriptor:
                os.close(descriptor)
        if len(data) < place.size:
            raise UnreadableImage(f"{path} in {tar.path}: cut short")
        return data

    def exists(self, path: str) -> bool:
        return self.index.find(path) is not None or (self.root / path).is_file()

    def _file(self, path: str) -> bytes:
        try:
            return file_bytes(self.root / path)
        except UnreadableImage:
            if self.exists(path):
                raise
            count = len(self.index.tars)
            raise UnreadableImage(
                f"{self.root / path}: in none of {count} tars, and no such file"
            ) from None

    def _open(self, number: int) -> int:
        """A descriptor of the tar; one that is not among the kept is the caller's to close."""
        if (kept := self._descriptors.get(number)) is not None:
            return kept
        tar = self.index.tars[number]
        path, advice = self.root / tar.path, f"python -m kit.data.tars {self.root}"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: gone since it was indexed; put it back or run {advice}"
            ) from None
        found = os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) != (tar.size, tar.mtime_ns):
            os.close(descriptor)
            raise ValueError(f"{path}: changed since it was indexed; run {advice}")
        if len(self._descriptors) < self.KEPT:
            kept = self._descriptors.setdefault(number, descriptor)
            if kept != descriptor:  # another thread was first
                os.close(descriptor)
            return kept
        return descriptor
