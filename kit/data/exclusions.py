"""exclusions.csv: images that no training list may hold, and why.

`id,reason,of`, a row an image; `of` is the image or the landmark that it collides with. The JSON
beside it tells how it was made and has the CSV's checksum. A list written by hand needs no JSON and
no column `of`. `kit.answers.audit` writes one.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import kit
from kit import checksums, files
from kit.data.tables import refuse_damaged
from kit.text import quoted

COLUMNS = ("id", "reason", "of")
DROPPED = "excluded: "  # what lists count them under, and the reason
ID = re.compile(r"[0-9a-f]{16}")


class Exclusion(NamedTuple):
    """One image that is left out."""

    id: str
    reason: str  # a kind, the same for many images: what is left out is counted by it
    of: str  # id of an image, or benchmark/landmark


def refuse_place(path: Path) -> None:
    """Refuses a place where no exclusion list can be written."""
    if path.suffix != ".csv":
        raise ValueError(
            f"{path}: an exclusion list is a .csv; its JSON lies beside it"
        )
    if path.exists():
        _parsed(path)


def write(path: Path, rows: Iterable[Exclusion], about: Mapping[str, Any]) -> Path:
    """Writes the CSV, then the JSON beside it; of an image's rows the first is kept.

    A file in its place that is no exclusion list is refused.
    """
    refuse_place(path)
    kept: dict[str, Exclusion] = {}
    for row in rows:
        kept.setdefault(row.id, row)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(kept.values())
    files.write_text(path, text.getvalue())
    counted = {
        "images": len(kept),
        "reasons": dict(Counter(row.reason for row in kept.values())),
        "hash": files.sha256(path),
        "kit": kit.__version__,
    }
    counted["checksums"] = checksums.compute_checksums(path.parent, [path.name])
    checksums.write_manifest(path.with_suffix(".json"), dict(about) | counted)
    return path


def read(path: Path) -> dict[str, str]:
    """Image id -> reason; refuses what is no exclusion list, and one that its JSON disowns."""
    return {row.id: row.reason for row in rows(path)}


def rows(path: Path) -> list[Exclusion]:
    """The same, row by row."""
    found = _parsed(path)
    refuse_damaged(path)
    return found


def _parsed(path: Path) -> list[Exclusion]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such exclusion list")
    found: dict[str, Exclusion] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            missing = {"id", "reason"} - set(table.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{path}: no exclusion list, it has no column {min(missing)}"
                )
            for row in table:
                name, reason = row["id"], row["reason"]
                if None in row or not ID.fullmatch(name or "") or not reason:
                    problem = f"is not the id of an image and a reason: {quoted(name)}"
                elif name in found:
                    problem = f"has {name} once more"
                else:
                    found[name] = Exclusion(name, reason, row.get("of") or "")
                    continue
                raise ValueError(f"{path}: line {table.line_num} {problem}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({error})") from None
    return list(found.values())
