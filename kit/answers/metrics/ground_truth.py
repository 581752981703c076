"""Which images each query of a benchmark is to find: the published files, and one JSON for all.

{"kind": "revisited", "images": ["all_souls_000000", ...],
 "queries": [{"image": "all_souls_000013", "box": [136.5, 34.1, 648.5, 955.7],
              "easy": [30, 69], "hard": [], "junk": [8]}, ...]}

Images are named by their files, without ending; numbers are rows of `images`; a box is left,
top, right, bottom in pixels, or null for the whole image. kind: a key of `revisited.SETUPS`,
which says what the groups of images are called.

Read besides: gnd_roxford5k.pkl and gnd_rparis6k.pkl of revisited Oxford and Paris, and a folder
of Oxford5k's and Paris6k's *_query.txt, *_good.txt, *_ok.txt and *_junk.txt.
"""

import io
import math
import pickle
import pickletools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit import files
from kit.answers.metrics import revisited

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

# all that a pickle of lists, tuples, dicts, text and numbers needs; none of them can name a
# class or call anything
_PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "DUP"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "LIST"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "DICT"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    # as Python 2 wrote them, and the protocol of lines
    *("SHORT_BINSTRING", "BINSTRING", "STRING", "UNICODE", "PUT", "GET"),
    *("INT", "LONG", "FLOAT"),
}
BROKEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Query:
    """What one query asks with, and the images of each group."""

    image: str
    box: Box | None  # None: the whole image
    groups: Mapping[str, np.ndarray]  # rows of GroundTruth.images
    label: str = ""  # its class, where a table tells it


@dataclass(frozen=True)
class GroundTruth:
    """A benchmark's queries and what they are to find."""

    kind: str  # of revisited.SETUPS
    images: Sequence[str]  # of the index, by name
    queries: Sequence[Query]

    @property
    def setups(self) -> Mapping[str, revisited.Setup]:
        return revisited.SETUPS[self.kind]


def read(path: Path) -> GroundTruth:
    """A .pkl, a .json or a folder, checked row by row."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.is_dir():
            return _classic(path)
        if path.suffix == ".json":
            return _from_json(files.read_json(path))
        return _from_pickle(plain(path.read_bytes()))
    except (*BROKEN, RecursionError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a ground truth ({said})") from None


def write(truth: GroundTruth, path: Path) -> Path:
    """The JSON form."""
    queries = [
        {"image": query.image, "box": query.box and list(query.box)}
        | {name: rows.tolist() for name, rows in query.groups.items()}
        for query in truth.queries
    ]
    value = {"kind": truth.kind, "images": list(truth.images), "queries": queries}
    return files.write_json(path, value)


def fingerprint(path: Path) -> str:
    """SHA-256 of a ground truth's file, or of the files in its folder."""
    if path.is_file():
        return files.sha256(path)
    return files.fingerprint({p.name: files.sha256(p) for p in _tables(path)})


def plain(data: bytes) -> Any:
    """What a pickle of lists, tuples, dicts, text and numbers holds; any other is refused."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _PLAIN:
                raise ValueError(
                    f"its pickle has {opcode.name}, beside lists, dicts, text and numbers"
                )
            if opcode.name in ("LONG_BINPUT", "PUT") and int(argument) > len(data):
                raise ValueError("its pickle counts more values than it has bytes")
        return _Plain(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, OverflowError) as error:
        raise ValueError(f"not a whole pickle: {error}") from None


class _Plain(pickle.Unpickler):
    """A second lock: no name of a class or function is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"its pickle names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("its pickle names something outside of it")


def _from_pickle(found: Any) -> GroundTruth:
    """The published form: imlist, qimlist, and gnd with bbx, easy, hard, junk, or ok and junk."""
    names, asked, about = (found[key] for key in ("imlist", "qimlist", "gnd"))
    if not len(asked) == len(about):
        raise ValueError(f"{len(asked)} queries, but answers of {len(about)}")
    kind = "revisited" if about and "easy" in about[0] else "classic"
    rows = [
        {"image": image, "box": each.get("bbx")}
        | {name: each[name] for name in ("easy", "hard", "ok", "junk") if name in each}
        | ({"good": []} if kind == "classic" else {})
        for image, each in zip(asked, about, strict=True)
    ]
    return _checked(kind, names, rows)


def _from_json(found: Any) -> GroundTruth:
    return _checked(found["kind"], found["images"], found["queries"])


def _checked(kind: str, names: Sequence[str], rows: Iterable[Any]) -> GroundTruth:
    if kind not in revisited.SETUPS:
        kinds = ", ".join(revisited.SETUPS)
        raise ValueError(f"kind {kind!r} is not one of {kinds}")
    images = [_name(name) for name in names]
    if len(set(images)) < len(images):
        twice = next(name for name in images if images.count(name) > 1)
        raise ValueError(f"image {twice} stands there twice")
    groups = _groups(kind)
    queries = [_query(row, groups, len(images)) for row in rows]
    return GroundTruth(kind, images, queries)


def _groups(kind: str) -> list[str]:
    setups = revisited.SETUPS[kind].values()
    return sorted({name for setup in setups for name in (*setup.positive, *setup.junk)})


def _query(row: Any, groups: Sequence[str], count: int) -> Query:
    image = _name(row["image"])
    found = {}
    for name in groups:
        if not all(type(n) is int and 0 <= n < count for n in row[name]):
            raise ValueError(f"query {image}: {name} has what is no row of its images")
        found[name] = np.array(row[name], dtype=np.int64)
    together = np.concatenate(list(found.values()))
    if len(np.unique(together)) < len(together):
        raise ValueError(f"query {image}: an image is in its groups twice")
    return Query(image, _box(row.get("box"), image), found)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        # in short: a few bytes of pickle hold lists that no memory could show whole
        raise ValueError(f"{reprlib.repr(value)} is no name of an image")
    return value


def _box(value: Any, image: str) -> Box | None:
    if value is None:
        return None
    numbers = [float(n) for n in value]
    fine = len(numbers) == 4 and all(map(math.isfinite, numbers))
    if not fine or not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise ValueError(f"query {image}: box {value} is not left, top, right, bottom")
    return tuple(numbers)


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_*.txt"))


def _classic(folder: Path) -> GroundTruth:
    """Images are those that some query names: any other of the index is a wrong answer."""
    asked = sorted(folder.glob("*_query.txt"))
    if not asked:
        raise FileNotFoundError(f"{folder}: no *_query.txt in it")
    texts = {}
    for path in asked:
        stem = path.name.removesuffix("_query.txt")
        for group in ("good", "ok", "junk"):
            table = folder / f"{stem}_{group}.txt"
            if not table.is_file():
                raise FileNotFoundError(f"{table}: no such file")
            texts[stem, group] = table.read_text(encoding="utf-8").split()
    images = sorted({name for names in texts.values() for name in names})
    row = {name: number for number, name in enumerate(images)}
    queries = []
    for path in asked:
        image, *box = path.read_text(encoding="utf-8").split()
        stem = path.name.removesuffix("_query.txt")
        groups = {
            group: [row[name] for name in texts[stem, group]]
            for group in ("good", "ok", "junk")
        }
        # Oxford's queries are named as its visual words are
        queries.append({"image": image.removeprefix("oxc1_"), "box": box} | groups)
    return _checked("classic", images, queries)
