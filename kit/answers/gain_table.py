"""gains.csv: mAP@100 of both halves after each step."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from kit import files
from kit.data.tables import read_csv

COLUMNS = ("step", "public", "private", "note")


def write(path: Path, rows: Sequence[tuple[str, float, float, str]]) -> Path:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((step, f"{a:.6f}", f"{b:.6f}", note) for step, a, b, note in rows)
    return files.write_text(path, text.getvalue())


def read(path: Path) -> list[tuple[str, float, float, str]]:
    table = read_csv(path, COLUMNS)
    numbers = (table[name].astype(float) for name in ("public", "private"))
    return list(zip(table["step"], *numbers, table["note"], strict=True))
