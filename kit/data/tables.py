"""CSVs -> tables of text, strictly: what is no table, or not this one, is refused in one line."""

import csv
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd

from kit import checksums
from kit.text import in_a_line, quoted

BLOCK = 1 << 18  # rows of a CSV read at a time
UTF_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # by byte order mark


def read_csv(
    path: Path, columns: Iterable[str], optional: Collection[str] = ()
) -> pd.DataFrame:
    """Columns of a CSV as text: an id stays one though it looks like a number, `NA` a word.

    optional: columns that come along where they are there. Others are read, so that a line of
    another length is noticed, and not kept: addresses weigh more than all ids.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    columns = list(columns)
    _check_header(path, columns)
    parts = []
    try:
        with pd.read_csv(
            path, dtype=str, keep_default_na=False, chunksize=BLOCK
        ) as blocks:
            for block in blocks:
                _refuse_other_columns(path, block, columns)
                kept = [n for n in block.columns if n in columns or n in optional]
                parts.append(block[kept])
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"{path}: not a CSV file ({in_a_line(error)})") from None
    return pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without surrounding white space; empty ones are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def encode_label(label: str) -> str:
    """A label as one word, for columns where white space separates labels; reversible.

    White space, commas, quotes and % become %XX as in web addresses, other characters stay:
    `Big Ben` is `Big%20Ben`, and the numbers of GLDv2 are themselves.
    """
    if label.isalnum():
        return label
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode())
        if c.isspace() or c in '%,"'
        else c
        for c in label
    )


def decode_label(word: str) -> str:
    """The label that `encode_label` has made `word` of."""
    return unquote(word) if "%" in word else word


def read_solution(path: Path) -> pd.DataFrame:
    """id, images (ids with spaces between them, empty where ignored), usage."""
    refuse_damaged(path)
    table = read_csv(path, ("id", "images", "Usage"))
    table = table[["id", "images", "Usage"]].rename(columns={"Usage": "usage"})
    _refuse_strange_usage(table, path)
    refuse_repeats(table["id"], path)
    table.loc[table["usage"] == "Ignored", "images"] = ""
    _refuse_repeats_within(table, "images", path)
    return table


def read_recognition(path: Path) -> pd.DataFrame:
    """id, landmarks (of train, with spaces between them; empty where none is shown), usage.

    A landmark is written as `encode_label` does.
    """
    refuse_damaged(path)
    table = read_csv(path, ("id", "landmarks", "Usage"))
    table = table[["id", "landmarks", "Usage"]].rename(columns={"Usage": "usage"})
    _refuse_strange_usage(table, path)
    refuse_repeats(table["id"], path)
    _refuse_repeats_within(table, "landmarks", path)
    return table


def read_continents(path: Path, column: str = "continent") -> dict[str, str]:
    """Country code -> continent; column `glr2021` has the 2021 system's choices."""
    table = read_csv(path, ("country", column))
    return dict(zip(table["country"], table[column], strict=True))


def refuse_damaged(path: Path) -> None:
    """Refuses a CSV that is not the one that the manifest beside it describes.

    What our own steps write has one; a file of a competition or of the user has none.
    """
    beside = path.with_suffix(".json")
    if beside.exists():
        repair = (
            f"make it again (00_image_lists, 01_clean_labels, kit.answers.audit), or remove "
            f"{beside.name} if {path.name} was changed by hand"
        )
        about = checksums.read_manifest(beside, repair)
        checksums.verify_files(path.parent, about, repair, [path.name])


def refuse_repeats(ids: pd.Series, source: Path) -> None:
    repeated = ids[ids.duplicated()]
    if len(repeated):
        first = in_a_line(repeated.iloc[0])
        raise ValueError(f"{source}: {first} stands there more than once")


def _check_header(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError where the first line tells why this is not the table: its encoding,
    another separator, spaces in names, a column twice."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    for mark, encoding in UTF_MARKS.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path}: not a CSV file ({encoding} text; save it as UTF-8)"
            )
    if b"\0" in start:
        raise ValueError(f"{path}: not a CSV file (it has NUL bytes)")
    text = start.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = (line for line in text.splitlines() if line.strip())
    names = next(csv.reader([next(lines, "")]), [])
    repeated = {name for name in names if names.count(name) > 1}
    if repeated & set(columns):
        raise ValueError(
            f"{path}: column {min(repeated & set(columns))} stands there twice"
        )
    for name in columns:
        if name in names:
            continue
        spaced = [other for other in names if other.strip() == name]
        if spaced:
            raise ValueError(
                f"{path}: no column {name}, but {quoted(spaced[0])} with a space around it"
            )
        for separator, word in ((";", "semicolons"), ("\t", "tabs")):
            if len(names) == 1 and name in names[0].split(separator):
                raise ValueError(
                    f"{path}: columns are separated by {word}; save it with commas"
                )


def _refuse_repeats_within(table: pd.DataFrame, column: str, path: Path) -> None:
    """Raise ValueError where a row names something twice: it would count twice."""
    for query, text in zip(table["id"], table[column], strict=True):
        words = text.split()
        if len(set(words)) < len(words):
            twice = next(word for word in words if words.count(word) > 1)
            raise ValueError(
                f"{path}: {in_a_line(query)} has {in_a_line(twice)} more than once"
            )


def _refuse_other_columns(
    path: Path, block: pd.DataFrame, columns: Sequence[str]
) -> None:
    if block.index.dtype != np.int64:  # pandas made the first column its index
        raise ValueError(
            f"{path}: not a CSV file (its lines are longer than the header)"
        )
    missing = [name for name in columns if name not in block.columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; it has "
            + in_a_line(", ".join(block.columns))
        )


def _refuse_strange_usage(table: pd.DataFrame, path: Path) -> None:
    unknown = set(table["usage"]) - {"Public", "Private", "Ignored"}
    if unknown:
        raise ValueError(
            f"{path}: Usage {quoted(min(unknown))} is not Public, Private or Ignored"
        )
