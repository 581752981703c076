"""What a dataset says -> image lists with one label space, and the lists read back.

A list is `<name>.csv` with the columns of `COLUMNS` and `<name>.json`, which counts rows, sources
and every kind of dropped row, and has the CSV's checksum. Lists: `clean`, `c2x` (clean landmarks with their rejected images),
`full` (all of train), `index`, `query`, `index_train` (full and the index images whose place
train knows), `all` (index_train and the test images), `gld_v1` (the first generation's images, with labels of
their own). `index_train_holdout` and `all_holdout` are
the last two without any validation query and any image of the index that validation searches:
whatever trains or votes for an offline number is made of these. No image of an exclusion list
(kit.data.exclusions) is in a list that can be trained on.

Definitions: 2nd place of Google Landmark Retrieval 2021, with its silent drops counted.
"""

import csv
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import kit
from kit import checksums, files
from kit.data import exclusions, images
from kit.data.readers import Folder, UnreadableImage, open_reader
from kit.data.sources import NONE_HELD_OUT, Facts
from kit.data.tables import read_lines, read_solution
from kit.text import quoted

log = logging.getLogger(__name__)

TRUTHS = ("solution.csv", "recognition.csv")  # answers of the queries
REPAIR = (
    "make it again: run 00_image_lists once more, --from 00_image_lists in the pipeline"
)
LARGEST_SOLUTION = 100_000_000  # bytes; all of GLDv2's has under one million
BLOCK = 1 << 18  # rows read at a time where a list is not kept

COLUMNS = {
    "id": str,
    "path": str,  # from the data folder
    "landmark_id": str,  # the dataset's own, which differs between train and index; -1: none
    "label": "int64",  # 0..C-1, clean landmarks first in file order; -1: none
    "clean": "int64",  # 1 where the label is trusted
    "country": "category",
    "continent": "category",
    "height": "int64",  # as shown, after EXIF rotation; -1: header not read
    "width": "int64",
}


@dataclass(frozen=True)
class ImageList:
    """One list in its canonical order."""

    name: str
    rows: pd.DataFrame  # columns of COLUMNS
    hash: str  # SHA-256 of the CSV

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Some columns, some rows at a time."""
        for start in range(0, len(self.rows), BLOCK):
            yield self.rows[start : start + BLOCK][list(columns)]

    @property
    def ids(self) -> np.ndarray:
        """(N,) U16."""
        return self.rows["id"].to_numpy().astype("U16")

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.rows["label"].to_numpy()


@dataclass(frozen=True)
class StoredList:
    """One list on disk; for those of millions of rows of which little is kept."""

    name: str
    path: Path
    hash: str

    def blocks(self, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        yield from _read(self.path, columns, BLOCK)


def build(
    facts: Facts,
    data: Path,
    out: Path,
    continents: Mapping[str, str] | None = None,
    *,
    index_ids: Path | None = None,
    sizes: bool = True,
    wanted: Sequence[str] = (),
    gld_v1_classes: int = 14_950,
    gld_v1_side: int = 256,
) -> dict[str, int]:
    """Writes every list that `facts` allow into `out`; returns the number of rows by name.

    data: the folder that paths start from. index_ids: a file with the ids of a competition's
    smaller index, one a line; `index_val` then holds them and every positive, and is what the
    holdout lists stay clear of. sizes: read heights and widths from the images' headers.
    wanted: names that must come out, `solution` and `recognition` among them, or nothing is written.
    gld_v1_classes, gld_v1_side: the most frequent landmarks of gld_v1 that are kept, of the images
    whose shorter side has so many pixels (2019); the side is not looked at without sizes.
    """
    if continents is not None:
        unknown = sorted(set(facts.country) - set(continents))
        if unknown:
            count = int((facts.country == unknown[0]).sum())
            raise ValueError(
                f"country {unknown[0]} ({count} landmarks) has no continent; add a row for it"
            )
    tables, dropped = _cut(facts, index_ids)
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        raise ValueError(f"{data}: no image in any list")
    truths = {"solution": facts.solution, "recognition": facts.recognition}
    made = {*tables, *(name for name, rows in truths.items() if len(rows))}
    missing = [name for name in wanted if name not in made]
    if missing:
        why = [f"; {n} {c}" for n, c in facts.notes.items() if NONE_HELD_OUT in n]
        raise ValueError(
            f"{data} gives no list {', '.join(missing)}; it gives {', '.join(sorted(made))}"
            + "".join(why)
        )
    _refuse_large_solution(facts.solution, data)
    shapes = _sizes(tables, data) if sizes else None
    if "gld_v1" in tables:
        tables["gld_v1"], more = _first_generation(
            tables["gld_v1"], shapes, gld_v1_classes, gld_v1_side
        )
        dropped["gld_v1"] |= more
    files.sweep_parts(out)
    counts = {}
    for name, table in tables.items():
        own = name == "gld_v1"  # labels that say nothing about countries
        country = np.repeat("", table["label"].max() + 1) if own else facts.country
        blocks = _finished(table, _Places.of(country, continents), shapes)
        about = {
            "name": name,
            "rows": len(table),
            "images": int((~table["id"].duplicated()).sum()),
            "labels": int(table.loc[table["label"] >= 0, "label"].nunique()),
            "classes": len(country),
            "without label": int((table["label"] < 0).sum()),
            "unreadable headers": None,
            "dropped": dict(dropped.get(name, {})),
            "notes": facts.notes,
            "sources": facts.sources,
            "root": str(data.resolve()),
        }
        counts[name] = _write(out / f"{name}.csv", blocks, about, sizes)
        log.info("list %-20s %9d rows", name, counts[name])
    answers = _truths(facts)
    _remove_others(out, {*counts, *answers})
    for name, table in answers.items():
        with (
            files.replacing(out / name) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):  # row by row: as one text, right answers of big classes would weigh gigabytes
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow([*table.columns[:-1], "Usage"])
            lines.writerows(zip(*(table[c] for c in table), strict=True))
        about = {"checksums": checksums.compute_checksums(out, [name])}
        about |= {"rows": len(table), "kit": kit.__version__}
        checksums.write_manifest((out / name).with_suffix(".json"), about)
    return counts


def _refuse_large_solution(solution: pd.DataFrame, data: Path) -> None:
    """Raise ValueError where queries times right answers make a file of over LARGEST_SOLUTION bytes."""
    lengths = solution["images"].str.len()
    if lengths.sum() > LARGEST_SOLUTION:
        most = len(solution["images"].iloc[int(lengths.argmax())].split())
        raise ValueError(
            f"{data}: solution.csv would have {lengths.sum() / 1e6:,.0f} MB, more than "
            f"{LARGEST_SOLUTION / 1e6:,.0f}: {len(solution):,} queries, of up to {most:,} right "
            "answers each; ask with fewer images of the large classes (folders query/ and index/, "
            "or the column split of a table)"
        )


def _truths(facts: Facts) -> dict[str, pd.DataFrame]:
    found = zip(TRUTHS, (facts.solution, facts.recognition), strict=True)
    return {name: table for name, table in found if len(table)}


def _cut(
    facts: Facts, index_ids: Path | None
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, int]]]:
    """Tables by list name, and what was dropped on the way to each, counted by reason."""
    full, index = facts.train, facts.index
    c2x = full[full["label"] < facts.clean["label"].nunique()]  # clean ones come first
    known = index[index["label"] >= 0].assign(clean=1)
    known, excluded = _allowed(known, facts.excluded)
    searched = set(index["id"])
    query = facts.query.assign(landmark_id="-1", label=-1)
    first, unwanted = _allowed(facts.gld_v1, facts.excluded)
    tables = {
        "clean": facts.clean,
        "c2x": c2x,
        "full": full,
        "index": index,
        "query": query,
        "gld_v1": first,
    }
    dropped = facts.lost | {"gld_v1": unwanted}
    dropped["c2x"] = {"landmark is not in the clean list": len(full) - len(c2x)}
    if index_ids is not None:
        searched = _searched(facts, index_ids)
        tables["index_val"] = index[index["id"].isin(searched)]
        left = len(index) - len(tables["index_val"])
        dropped["index_val"] = {"not in the given ids, no positive": left}
    if full.empty:
        return tables, dropped
    free = known[~known["id"].isin(searched)]
    unplaced = int((index["label"] < 0).sum())
    unknown = {"index image of a place unknown to train": unplaced} | excluded
    hidden = {"index image that validation searches": len(known) - len(free)}
    if len(index):
        tables["index_train"] = pd.concat([full, known], ignore_index=True)
        tables["index_train_holdout"] = pd.concat([full, free], ignore_index=True)
        dropped["index_train"] = unknown
        dropped["index_train_holdout"] = unknown | hidden
    if len(facts.solution):
        tested, lost = _tested(facts)
        tested, more = _allowed(tested, facts.excluded)
        ignored = tested[tested["label"] < 0]
        asked = {"row of a validation query": len(tested) - len(ignored)}
        tables["all"] = pd.concat([full, known, tested], ignore_index=True)
        tables["all_holdout"] = pd.concat([full, free, ignored], ignore_index=True)
        for reason, count in more.items():
            lost[reason] = count + excluded.get(reason, 0)
        dropped["all"] = unknown | lost
        dropped["all_holdout"] = unknown | hidden | asked  # from what is in `all`
    return tables, dropped


def _allowed(
    rows: pd.DataFrame, excluded: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows whose image is not excluded, and how many are by reason."""
    if not excluded:
        return rows, {}
    reason = rows["id"].map(excluded)
    counts = reason.value_counts().sort_index()
    found = {exclusions.DROPPED + why: int(count) for why, count in counts.items()}
    return rows[reason.isna()], found


def _first_generation(
    rows: pd.DataFrame, shapes: pd.DataFrame | None, classes: int, side: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """GLD-v1 as the 2019 system cut it, labels in the order of landmark ids; what was dropped."""
    kept = rows
    if shapes is not None:
        kept = rows[shapes.loc[rows["path"]].min(axis=1).to_numpy() >= side]
    ids, counts = np.unique(kept["landmark_id"].to_numpy(str), return_counts=True)
    # numbers by value, texts by spelling; of equally frequent landmarks the first stay
    order = np.lexsort((ids, [int(i) if i.isdecimal() else -1 for i in ids]))
    ids, counts = ids[order], counts[order]
    frequent = np.sort(np.argsort(-counts, kind="stable")[:classes])
    label = kept["landmark_id"].map(
        dict(zip(ids[frequent], range(classes), strict=False))
    )
    found = kept.assign(label=label)[label.notna()].astype({"label": np.int64})
    if found.empty:
        raise ValueError(f"gld_v1: no image has a shorter side of {side} pixels")
    return found, {
        f"shorter side under {side}, or unreadable": len(rows) - len(kept),
        f"landmark is not among the {classes} most frequent": len(kept) - len(found),
    }


def _searched(facts: Facts, index_ids: Path) -> set[str]:
    """A competition's index and every positive of the solution."""
    wanted = [line for line in read_lines(index_ids) if line != "id"]
    if not wanted:
        raise ValueError(f"{index_ids}: no id in it")
    known = set(facts.index["id"])
    strange = set(wanted) - known
    if strange:
        raise ValueError(
            f"{index_ids}: {quoted(min(strange))} is not an image of the index "
            f"({len(strange)} of {len(wanted)} are not; the index has such as {min(known)})"
        )
    return set(wanted) | set(" ".join(facts.solution["images"].unique()).split())


def _tested(facts: Facts) -> tuple[pd.DataFrame, dict[str, int]]:
    """Test images with the labels of their positives, in the solution's order.

    One row a label; ignored queries have one row with -1.
    """
    solution = facts.solution.merge(facts.query, on="id", how="inner")
    label_of = dict(zip(facts.index["id"], facts.index["label"], strict=True))
    codes, texts = pd.factorize(
        solution["images"]
    )  # queries of a landmark share theirs
    found = [[label_of.get(name) for name in text.split()] or [None] for text in texts]
    absent = np.array([labels.count(None) for labels in found], dtype=np.int64)
    unknown = np.array([labels.count(-1) for labels in found], dtype=np.int64)
    known = [
        [n for n in dict.fromkeys(labels) if n not in (None, -1)] for labels in found
    ]
    asked = (solution["usage"] != "Ignored").to_numpy()
    labels = [known[c] if a else [-1] for c, a in zip(codes, asked, strict=True)]
    kept = solution.assign(label=labels).explode("label").dropna(subset="label")
    kept = kept.astype({"label": np.int64})
    lost = {
        "query that is not in the test list": len(facts.solution) - len(solution),
        "test image that is not in the solution": len(facts.query) - len(solution),
        "positive that is not in the index": int(absent[codes][asked].sum()),
        "positive of a place unknown to train": int(unknown[codes][asked].sum()),
        "query without any label that train knows": len(solution)
        - kept["id"].nunique(),
    }
    kept = kept.assign(landmark_id="-1", clean=1)
    return kept[["id", "path", "landmark_id", "label", "clean"]], lost


@dataclass(frozen=True)
class _Places:
    """What the lists say of a label besides its number."""

    country: (
        np.ndarray
    )  # (C + 1,) code of each label; the last, empty one is label -1's
    continent: np.ndarray  # (C + 1,)

    @classmethod
    def of(cls, country: np.ndarray, continents: Mapping[str, str] | None) -> "_Places":
        country = np.append(country, "").astype(object)
        continent = [(continents or {}).get(code, "") for code in country]
        return cls(country, np.array(continent, dtype=object))


def _finished(
    table: pd.DataFrame, places: _Places, shapes: pd.DataFrame | None
) -> Iterator[pd.DataFrame]:
    """Rows with all columns, block by block. shapes: height and width by path."""
    for start in range(0, len(table), BLOCK):
        block = table[start : start + BLOCK]
        label = block["label"].to_numpy(dtype=np.int64)
        rows = pd.DataFrame(
            {
                "id": block["id"].to_numpy(),
                "path": block["path"].to_numpy(),
                "landmark_id": block["landmark_id"].to_numpy(),
                "label": label,
                "clean": block["clean"].to_numpy(np.int64)
                if "clean" in block
                else (label >= 0) * 1,
                "country": places.country[label],
                "continent": places.continent[label],
            }
        )
        rows["height"], rows["width"] = -1, -1
        if shapes is not None:
            rows[["height", "width"]] = shapes.loc[rows["path"]].to_numpy()
        yield rows


def _sizes(tables: Mapping[str, pd.DataFrame], data: Path) -> pd.DataFrame:
    """Height and width by path, every header read once; of a tar's member, all of it."""
    reader = open_reader(data)

    def size(path: str) -> tuple[int, int]:
        if isinstance(reader, Folder):
            return images.header_size(data / path)
        try:
            return images.header_size(reader.read(path))
        except UnreadableImage:
            return -1, -1

    paths = pd.concat([table["path"] for table in tables.values()]).unique()
    sizes = np.empty((len(paths), 2), dtype=np.int32)
    with ThreadPoolExecutor(16) as pool:  # waits for the disk most of the time
        for start in range(
            0, len(paths), 10_000
        ):  # a future for each of millions weighs
            some = paths[start : start + 10_000]
            found = pool.map(size, some)
            sizes[start : start + len(some)] = list(found)
    return pd.DataFrame(sizes, index=paths)


def _write(
    path: Path, blocks: Iterable[pd.DataFrame], about: dict[str, Any], sizes: bool
) -> int:
    """The CSV, then the JSON beside it; returns the number of rows."""
    unreadable, examples = 0, []
    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(COLUMNS)
        for rows in blocks:
            lines.writerows(zip(*(rows[c].tolist() for c in COLUMNS), strict=True))
            lost = rows.loc[rows["height"] < 0, "path"]
            unreadable += len(lost)
            examples += lost.head(10 - len(examples)).tolist()
    if sizes:
        about["unreadable headers"] = unreadable
        about["unreadable, such as"] = examples
        if unreadable:
            log.warning(
                "list %s: %d of %d images are missing or unreadable, such as %s",
                *(path.stem, unreadable, about["rows"], examples[0]),
            )
    describe_file(path, about)
    return about["rows"]


def describe_file(path: Path, about: dict[str, Any]) -> Path:
    """Write the JSON beside a list's CSV: `about` it, its hash and its checksum."""
    made = {"hash": files.sha256(path), "kit": kit.__version__}
    made["checksums"] = checksums.compute_checksums(path.parent, [path.name])
    return checksums.write_manifest(path.with_suffix(".json"), about | made)


def _remove_others(out: Path, kept: Collection[str]) -> None:
    """Lists and solutions of an earlier build from other data."""
    for about in out.glob("*.json"):
        if about.stem not in kept and _is_ours(about):
            about.unlink()
            about.with_suffix(".csv").unlink(missing_ok=True)
    for name in {*TRUTHS} - {*kept}:
        (out / name).with_suffix(".json").unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)


def _is_ours(about: Path) -> bool:
    """Whether a JSON file describes a list."""
    try:
        found = files.read_json(about)
    except (OSError, ValueError):  # such as a link to what is mounted no more
        return False
    return isinstance(found, dict) and {"name", "rows", "hash", "kit"} <= found.keys()


def load(folder: Path, name: str, columns: Sequence[str] = tuple(COLUMNS)) -> ImageList:
    """The list `name` of `folder`, or some columns; refuses what its JSON does not describe.

    Millions of rows weigh gigabytes in text columns: ranks load those they need.
    """
    found = find(folder, name)
    return ImageList(name, _read(found.path, columns), found.hash)


def find(folder: Path, name: str) -> StoredList:
    """The list `name` of `folder`, to be read block by block; refused as by `load`."""
    path = folder / f"{name}.csv"
    if not path.exists() or not path.with_suffix(".json").exists():
        there = (
            ", ".join(sorted(p.stem for p in folder.glob("*.json") if _is_ours(p)))
            or "none"
        )
        raise FileNotFoundError(
            f"no list {name} in {folder} (there: {there}); run 00_image_lists first"
        )
    about = checksums.read_manifest(path.with_suffix(".json"), REPAIR, ("hash",))
    checksums.verify_files(folder, about, REPAIR, [path.name])
    return StoredList(name, path, about["hash"])


def _read(path: Path, columns: Sequence[str], block: int | None = None) -> Any:
    """A table, or blocks of one."""
    return pd.read_csv(
        path,
        dtype=COLUMNS,
        keep_default_na=False,
        usecols=list(columns),
        chunksize=block,
    )


def describe(folder: Path) -> pd.DataFrame:
    """One row a list: rows, labels, images whose header cannot be read, and what was dropped and why."""
    about = [
        files.read_json(path)
        for path in sorted(folder.glob("*.json"))
        if _is_ours(path)
    ]
    return pd.DataFrame(
        {
            "list": [a["name"] for a in about],
            "rows": [a["rows"] for a in about],
            "labels": [a["labels"] for a in about],
            "without label": [a["without label"] for a in about],
            # None where no image was looked at
            "missing or unreadable": [a["unreadable headers"] for a in about],
            "dropped": [_counted(a["dropped"]) for a in about],
        }
    ).sort_values("rows", ignore_index=True)


def describe_notes(folder: Path) -> list[str]:
    """One line a thing that was decided while the data were read, with its count."""
    for path in sorted(folder.glob("*.json")):
        if _is_ours(path):
            about = files.read_json(path)
            return [f"{what}: {n}" for what, n in about["notes"].items() if n]
    return []


def _counted(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count}" for reason, count in reasons.items() if count)


def leaks(seen: Mapping[str, str], folder: Path, searched: ImageList) -> dict[str, int]:
    """Images that an offline number must not have seen, by the list that has them.

    seen: hash -> name of every list that a checkpoint or reference store met through its whole
    chain. searched: the index of the number; its queries are those of the solution in `folder`.
    A hash that no list in `folder` has cannot be judged and counts as -1.
    """
    solution = read_solution(folder / "solution.csv")
    forbidden = set(solution.loc[solution["usage"] != "Ignored", "id"]) | set(
        searched.rows["id"]
    )
    here = {
        files.read_json(path)["hash"]: path.stem
        for path in folder.glob("*.json")
        if _is_ours(path)
    }
    found = {}
    for digest, name in seen.items():
        if digest not in here:
            found[name] = -1
            continue
        there = load(folder, here[digest], ("id",))
        common = forbidden.intersection(there.rows["id"])
        if common:
            found[name] = len(common)
    return found
