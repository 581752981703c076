"""What a download could not have or would not keep -> CSVs beside the data."""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import files
from kit.data.download.official import Tar


def write(
    out: Path, bad: Iterable[tuple[str, str]], records: Mapping[Tar, Mapping[str, Any]]
) -> None:
    """bad: address and reason; records: of every tar that is done, what came of it."""
    rows(out / "bad.csv", ("url", "reason"), bad)
    refused = [
        (f"{tar.split}/{tar.name}", member, reason)
        for tar, record in records.items()
        for member, reason in record["refused"].items()
    ]
    rows(out / "refused.csv", ("tar", "member", "reason"), refused)
    unreadable = [
        (f"{tar.split}/{path}", reason)
        for tar, record in records.items()
        for path, reason in record.get("unreadable", {}).items()
    ]
    rows(out / "unreadable.csv", ("path", "reason"), unreadable)


def summary(records: Collection[Mapping[str, Any]]) -> str:
    """One line about the tars that are done."""
    counts = {
        "images": sum(record["images"] for record in records),
        "unreadable ones": sum(len(r.get("unreadable", {})) for r in records),
        "refused members": sum(len(record["refused"]) for record in records),
        "files that are no images": sum(record["strange"] for record in records),
    }
    found = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n) or "no image"
    return f"{len(records)} tars: {found}"


def rows(path: Path, columns: Sequence[str], values: Iterable[Sequence[str]]) -> None:
    # names in a tar need not be text
    with (
        files.replacing(path) as temporary,
        temporary.open("w", newline="", errors="backslashreplace") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(values)
