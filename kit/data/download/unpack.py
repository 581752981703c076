"""An official tar -> its images as files, or shrunk in a shard; nothing else leaves it.

A member leaves only under an image's official name, `a/b/c/<id>.jpg`. Absolute and `..` paths,
links, devices and what is too large for an image are refused one by one, by name; the other
members go on.
"""

import os
import re
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kit.data import shards, tars

IMAGE = re.compile(r"([0-9a-f])/([0-9a-f])/([0-9a-f])/(\1\2\3[0-9a-f]{13})\.jpg")
LARGEST = 1 << 28  # bytes of an image


@dataclass(frozen=True)
class Contents:
    """What is in a tar."""

    images: dict[str, tuple[int, int]]  # a/b/c/<id>.jpg -> offset, bytes
    refused: dict[str, str]  # member -> why it is left in the tar
    strange: int  # plain files that are no image of the dataset
    unwanted: int  # images that nobody asked for

    @property
    def counts(self) -> dict[str, Any]:
        return {
            "refused": self.refused,
            "strange": self.strange,
            "unwanted": self.unwanted,
        }


def contents(path: Path, wanted: Container[str] | None = None) -> Contents:
    """wanted: ids; None: every image. Refuses a damaged tar and one without any image."""
    images, refused, strange, unwanted, seen = {}, {}, 0, 0, 0
    for member in tars.walk(path):
        problem = member.problem
        if not problem and member.size > LARGEST:
            problem = f"has {member.size} bytes, too many for an image"
        if problem:
            refused[member.name] = problem
        elif not (match := IMAGE.fullmatch(member.name)):
            strange += 1
        else:
            seen += 1
            if wanted is None or match[4] in wanted:
                images[member.name] = member.offset, member.size
            else:
                unwanted += 1
    if not seen:
        raise ValueError(f"{path}: no member is an image a/b/c/<id>.jpg")
    return Contents(images, refused, strange, unwanted)


def extract(path: Path, found: Contents, folder: Path) -> None:
    """Writes the images, as they are, to `folder`; each is whole or absent."""
    with _Members(path, found.images) as reader:
        for name in found.images:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # two tars that claim one image do not meet in one file
            temporary = target.with_name(f".{target.name}.{path.stem}.part")
            temporary.write_bytes(reader.read(name))
            temporary.replace(target)
    os.sync()  # once: for each of millions it would take days


def pack(
    path: Path,
    found: Contents,
    shard: Path,
    pool: ThreadPoolExecutor,
    side: int,  # of the shorter side, pixels; smaller images keep their size
    quality: int,
) -> dict[str, Any]:
    """Writes the shrunk images as JPEGs under their names; what it gives is a shard's record.

    Where there is nothing to pack there is no shard.
    """
    if not found.images:
        return {"images": 0, "unreadable": {}}
    names = list(found.images)
    with _Members(path, found.images) as reader:
        encoded = shards.encoded(pool, reader, names, side, quality)
        return shards.write(shard, zip(names, encoded, strict=True))


class _Members:
    """A reader (kit.data.readers) of a tar that is in no index."""

    def __init__(self, path: Path, images: Mapping[str, tuple[int, int]]) -> None:
        self.root, self.images = path, images

    def __enter__(self) -> Self:
        self.descriptor = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read(self, path: str) -> bytes:
        offset, size = self.images[path]
        return os.pread(self.descriptor, size, offset)

    def exists(self, path: str) -> bool:
        return path in self.images
