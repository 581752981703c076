"""Where GLDv2's files are offered and how large they are, as `datasets_meta/gldv2.json` has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kit import files

SPLITS = ("train", "index", "test")


class Tar(NamedTuple):
    """One of the official tars."""

    split: str
    number: int

    @property
    def name(self) -> str:
        return f"images_{self.number:03d}.tar"

    @property
    def key(self) -> str:
        return f"{self.split}_{self.number:03d}"


@dataclass(frozen=True)
class Table:
    """One of the official CSVs."""

    path: str  # on the host
    columns: Sequence[str]  # that it must have


@dataclass(frozen=True)
class Official:
    """What the hosts offer."""

    host: str
    country_host: str
    tables: Mapping[str, Table]  # by their place in a data folder
    counts: Mapping[str, int]  # tars of each split
    bytes: Mapping[str, int]  # of one of them, about
    landmarks: int  # of train
    patterns: Mapping[str, str]  # of tar, md5 and country, with gaps to fill in

    def tars(self, splits: Sequence[str], numbers: Sequence[int] | None) -> list[Tar]:
        """Those of some splits; numbers: only these, where a split has them."""
        return [
            Tar(split, n)
            for split in dict.fromkeys(splits)
            for n in range(self.counts[split])
            if numbers is None or n in numbers
        ]

    def table(self, place: str) -> str:
        return f"{self.host}/{self.tables[place].path}"

    def tar(self, tar: Tar) -> str:
        return f"{self.host}/{self.patterns['tar'].format(**tar._asdict())}"

    def md5(self, tar: Tar) -> str:
        return f"{self.host}/{self.patterns['md5'].format(**tar._asdict())}"

    def country(self, code: str) -> str:
        return f"{self.country_host}/{self.patterns['country'].format(code=code)}"


def read(path: Path, host: str = "", country_host: str = "") -> Official:
    """host, country_host: mirrors with the same paths, instead of the hosts in the file."""
    try:
        whole = files.read_json(path)
        about = whole["files"]
        return Official(
            (host or about["host"]).rstrip("/"),
            (country_host or about["country_host"]).rstrip("/"),
            {place: Table(**table) for place, table in about["tables"].items()},
            {split: about["tars"][split]["count"] for split in SPLITS},
            {split: about["tars"][split]["about_bytes"] for split in SPLITS},
            whole["train"]["landmarks"],
            {name: about[name] for name in ("tar", "md5", "country")},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not in the form of gldv2.json ({error})") from None
