"""CSVs -> tables of text, strictly: what is no table, or not this one, is refused in one line."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kit import checksums

BLOCK = 1 << 18  # rows of a CSV read at a time


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


def read_solution(path: Path) -> pd.DataFrame:
    """id, images (ids with spaces between them, empty where ignored), usage."""
    refuse_damaged(path)
    table = read_csv(path, ("id", "images", "Usage"))
    table = table[["id", "images", "Usage"]].rename(columns={"Usage": "usage"})
    _refuse_strange_usage(table, path)
    refuse_repeats(table["id"], path)
    table.loc[table["usage"] == "Ignored", "images"] = ""
    return table


def read_recognition(path: Path) -> pd.DataFrame:
    """id, landmarks (of train, with spaces between them; empty where none is shown), usage."""
    refuse_damaged(path)
    table = read_csv(path, ("id", "landmarks", "Usage"))
    table = table[["id", "landmarks", "Usage"]].rename(columns={"Usage": "usage"})
    _refuse_strange_usage(table, path)
    refuse_repeats(table["id"], path)
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


def in_a_line(what: object, most: int = 100) -> str:
    """Something out of a file, for a message: no line ends, nothing unprintable, not too long."""
    shown = (c if c.isprintable() else " " for c in str(what))
    text = " ".join("".join(shown).split())
    return text if len(text) <= most else f"{text[:most]}..."


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
            f"{path}: Usage {in_a_line(min(unknown))!r} is not Public, Private or Ignored"
        )
