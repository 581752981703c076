"""GLDv2's official CSVs, a CSV of your own, or a folder per class -> `Facts`, what a dataset says.

Definitions: 2nd place of Google Landmark Retrieval 2021; the category join is by name because
train and index number their landmarks differently.
"""

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd

from kit.data import exclusions
from kit.data.id_forms import refuse_other_form
from kit.data.readers import open_reader
from kit.data.tables import (
    encode_label,
    read_csv,
    read_recognition,
    read_solution,
    refuse_damaged,
    refuse_repeats,
)
from kit.text import in_a_line, quoted

SPLITS = ("train", "index", "query")
ID = re.compile(r"[0-9a-f]{16}")
# what the decoder reads (kit.data.images), in any case
PICTURE = re.compile(
    r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|avif|bmp|dib|tiff?|j2[ck]|jp[2cfx]|gif|p[bgpn]m)$",
    re.IGNORECASE,
)
# what systems, archives and network disks leave beside photographs; hidden names besides
LEFTOVERS = frozenset(
    {
        *("__macosx", "icon\r", "temporary items", "network trash folder"),  # macOS
        *("$recycle.bin", "recycler", "found.000", "system volume information"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("@eadir", "@tmp", "@synoeastream", "#recycle", "#snapshot"),  # Synology
        *("@__thumb", "@recycle", "@recently-snapshot", "@sharebin", "@transcode"),
        *("~snapshot", "lost+found", "_gsdata_"),
    }
)
FLOAT = re.compile(r"[+-]?\d+\.\d*")  # as pandas writes a whole number beside a gap
NONE: Mapping[str, str] = MappingProxyType({})
NOT_IN_TRAIN = "image is not in train.csv"
LINE_ENDS = [chr(code) for code in (*range(32), 127, 0x85, 0x2028, 0x2029)]
NONE_HELD_OUT = "no class is held out for queries: every class number"
OTHER = "OTHER"  # the country of a landmark in no country file


@dataclass
class Facts:
    """What a dataset says, before lists are cut from it. Tables are in file order.

    `train` and `clean` have id, path, landmark_id, label, clean; `index` has id, path, landmark_id,
    label (-1 where train does not know the place); `query` has id and path; `solution` has id,
    images (ids with spaces between them) and usage; `recognition` has id, landmarks (of train, with
    spaces between them, empty where none is shown) and usage.
    """

    train: pd.DataFrame
    clean: pd.DataFrame
    index: pd.DataFrame
    query: pd.DataFrame
    solution: pd.DataFrame
    country: np.ndarray  # (C,) country code of each label
    sources: dict[str, int]  # rows read, by file
    notes: dict[str, int]  # what was decided along the way, counted
    gld_v1: pd.DataFrame = field(  # id, path, landmark_id: the first generation's own
        default_factory=lambda: _empty("id", "path", "landmark_id")
    )
    recognition: pd.DataFrame = field(
        default_factory=lambda: _empty("id", "landmarks", "usage")
    )
    excluded: Mapping[str, str] = field(default_factory=dict)  # id -> why
    # of train's images, that stand in no table any more: list -> reason -> how many
    lost: dict[str, dict[str, int]] = field(default_factory=dict)


def completeness(facts: Facts, whole: Mapping[str, Any]) -> str:
    """One line: how what was read compares with the whole of GLDv2, as gldv2.json counts it."""
    counts = {
        "train images": (len(facts.train), whole["train"]["images"]),
        "landmarks": (len(facts.country), whole["train"]["landmarks"]),
        "clean images": (len(facts.clean), whole["clean"]["images"]),
        "clean landmarks": (
            facts.clean["landmark_id"].nunique(),
            whole["clean"]["landmarks"],
        ),
        "index images": (len(facts.index), whole["index"]),
        "test images": (len(facts.query), whole["test"]),
    }
    other = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
    if not other:
        return "all of GLDv2"
    told = [f"{found:,} of {there:,} {name}" for name, (found, there) in other.items()]
    return f"not all of GLDv2: {', '.join(told)}"


def category_name(text: str) -> str:
    """The name in a Wikimedia category address, decoded, so that both label spaces can meet."""
    return unquote(text.rpartition("Category:")[2]).replace("_", " ").strip()


def read(
    data: Path,
    layout: str = "gldv2",
    table: str = "",
    *,
    clean: Path | None = None,
    excluded: Mapping[str, str] | None = None,
    there: bool = True,
) -> Facts:
    """layout: `gldv2` (official CSVs), `csv` (`table`: path,label[,group,split]) or `folders`.

    clean: another clean list, landmark_id,images, instead of the data's own. excluded: id -> why of
    images that nothing may train on. there: of gldv2, refuse a folder without the images.
    """
    readers = {
        "gldv2": lambda: official(data, clean, excluded or {}, there),
        "csv": lambda: from_csv(Path(table), data),
        "folders": lambda: from_folders(data),
    }
    if layout not in readers:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(readers)}")
    if layout == "csv" and not table:
        raise ValueError("layout csv needs a table: the file path,label[,group,split]")
    if clean is not None:
        refuse_damaged(clean)
    facts = readers[layout]()
    if layout != "gldv2" and (clean or excluded):
        facts = _recut(facts, clean, excluded or {})
    if excluded:
        tables = (facts.train, facts.index, facts.query, facts.gld_v1)
        known = {name for table in tables for name in table["id"]}
        gone = sum(facts.lost.get("full", {}).values())
        facts.notes["images of the exclusion list that the data lack"] = (
            len(set(excluded) - known) - gone
        )
    other = len(facts.clean) - int(facts.train["clean"].sum())
    if clean and other > 0:
        facts.notes["images of the clean list under another landmark than train's"] = (
            other
        )
    return facts


def official(
    data: Path,
    cleaned: Path | None = None,
    excluded: Mapping[str, str] = NONE,
    there: bool = True,
) -> Facts:
    """A folder in GLDv2's layout, GLD-v1 in gld_v1/ beside it; what is missing gives empty tables."""
    cleaned = cleaned and cleaned.absolute()  # the data's own tables lie in `data`
    sources: dict[str, int] = {}
    notes: dict[str, int] = {}
    lost: dict[str, dict[str, int]] = {}

    def table(name: str | Path, *columns: str) -> pd.DataFrame:
        found = read_csv(data / name, columns)
        if found.empty:
            raise ValueError(f"{data / name}: no rows")
        for column in columns:
            if (gap := found[column] == "").any():
                line = int(gap.idxmax()) + 2
                raise ValueError(f"{data / name}: line {line} has no {column}")
        if "landmark_id" in columns:
            _check_landmarks(found["landmark_id"], data / name)
        sources[str(name)] = len(found)
        return found

    if not any((data / split).is_dir() for split in ("train", "index", "test")):
        raise FileNotFoundError(
            f"{data}: no train/, index/ or test/ folder in GLDv2's layout"
        )
    train = clean = _empty("id", "path", "landmark_id", "label", "clean")
    index = _empty("id", "path", "landmark_id", "label")
    query, solution = _empty("id", "path"), _empty("id", "images", "usage")
    recognition = _empty("id", "landmarks", "usage")
    landmarks = pd.Index([], dtype=object)  # landmark_id of each label
    names: dict[str, int] = {}  # category -> label
    if (data / "train").is_dir():
        train = table("train/train.csv", "id", "landmark_id")
        refuse_repeats(train["id"], data / "train/train.csv")
        train["path"] = _paths(train["id"], "train", data / "train/train.csv")
        source = cleaned or data / "train/train_clean.csv"
        clean = _clean_rows(
            table(cleaned or "train/train_clean.csv", "landmark_id", "images"), source
        )
        clean["path"] = _paths(clean["id"], "train", source)
        if cleaned:
            _refuse_strangers(clean["id"], train["id"], cleaned)
        clean, strange = _only_of(train, clean, source)
        train, clean, lost = _without(train, clean, excluded)
        if strange:  # train.csv is a part of the data's own
            lost["clean"] = {NOT_IN_TRAIN: strange} | lost.get("clean", {})
        known = set(train["landmark_id"])
        refuse_other_form(clean["landmark_id"], known, source, "train.csv")
        train, clean, landmarks = _labelled(train, clean)
        categories = table(
            "train/train_label_to_category.csv", "landmark_id", "category"
        )
        _compare_ids(
            *(categories["landmark_id"], landmarks, notes),
            *(data / "train/train_label_to_category.csv", "landmarks of train.csv"),
        )
        names = _labels_by_name(categories, landmarks, notes)
    if (data / "index").is_dir():
        index = _official_index(
            table("index/index.csv", "id"),
            table("index/index_image_to_landmark.csv", "id", "landmark_id"),
            table("index/index_label_to_category.csv", "landmark_id", "category"),
            names,
            data,
            notes,
        )
    if (data / "test").is_dir():
        query = table("test/test.csv", "id")[["id"]]
        refuse_repeats(query["id"], data / "test/test.csv")
        query["path"] = _paths(query["id"], "test", data / "test/test.csv")
        path = data / "test/retrieval_solution_v2.1.csv"
        if path.exists():
            solution = read_solution(path)
            sources[f"test/{path.name}"] = len(solution)
            _compare_ids(
                solution["id"], query["id"], notes, path, "queries of test.csv"
            )
            if len(index):
                truth = set(" ".join(solution["images"].unique()).split())
                refuse_other_form(sorted(truth), set(index["id"]), path, "index.csv")
                notes["right answers of the solution that index.csv lacks"] = len(
                    truth.difference(index["id"])
                )
        path = data / "test/recognition_solution_v2.1.csv"
        if path.exists():
            recognition = read_recognition(path)
            sources[f"test/{path.name}"] = len(recognition)
            _compare_ids(
                recognition["id"], query["id"], notes, path, "queries of test.csv"
            )
            if len(landmarks):
                truth = recognition["landmarks"].str.split().explode().dropna()
                refuse_other_form(truth, set(landmarks), path, "train.csv")
                notes["landmarks of the solution that train.csv lacks"] = int(
                    (~truth.isin(landmarks)).sum()
                )
    country = _countries(data / "train/country", landmarks, notes)
    for rows in (train, index, query) if there else ():
        _refuse_wrong_root(rows, data)
    everything = pd.concat([train["id"], index["id"], query["id"]], ignore_index=True)
    refuse_repeats(everything, data)  # one image in two splits would leak
    facts = Facts(train, clean, index, query, solution, country, sources, notes)
    facts.recognition, facts.excluded, facts.lost = recognition, excluded, lost
    if (data / "gld_v1").is_dir():
        first = table("gld_v1/train.csv", "id", "landmark_id")
        facts.gld_v1 = _first_generation(first, data / "gld_v1/train.csv")
    return facts


def image_ids(folder: Path) -> Iterator[str]:
    """Ids of the images a/b/c/<id>.jpg in a folder, in their order; other files are left out.

    They come as they are found: to list a competition's whole index takes minutes.
    """
    for _, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_leftover(name))
        stems = (name.removesuffix(".jpg") for name in names if name.endswith(".jpg"))
        yield from sorted(filter(ID.fullmatch, stems))


def competition(data: Path, query: str = "test", index: str = "index") -> Facts:
    """A competition's images, <folder>/a/b/c/<id>.jpg, without any table; in the order of ids.

    A rerun replaces the folders' content, and the hidden images are in no CSV.
    """
    sources: dict[str, int] = {}
    tables = {}
    for split, folder in ((query, "query"), (index, "index")):
        place = data / split
        if not place.is_dir():
            there = ", ".join(sorted(p.name for p in data.glob("*") if p.is_dir()))
            raise FileNotFoundError(f"no folder {place}; there: {there or 'none'}")
        ids = sorted(image_ids(place))
        if not ids:
            raise ValueError(f"{place}: no image in it")
        rows = pd.DataFrame({"id": ids}, dtype=object)
        refuse_repeats(rows["id"], place)
        rows["path"] = _paths(rows["id"], split, place)
        _refuse_wrong_root(rows, data)
        tables[folder] = rows
        sources[split] = len(rows)
    unlabelled = tables["index"].assign(landmark_id="-1", label=-1)
    nothing = _empty("id", "path", "landmark_id", "label", "clean")
    return Facts(
        train=nothing,
        clean=nothing,
        index=unlabelled,
        query=tables["query"],
        solution=_empty("id", "images", "usage"),
        country=np.array([], dtype=object),
        sources=sources,
        notes={},
    )


def _check_landmarks(landmarks: pd.Series, source: Path) -> None:
    """Raise ValueError for `10.0` and ` 10`: tables are joined by text, so that such an id would
    be another landmark than the `10` of another table."""
    for name in pd.unique(landmarks):
        if FLOAT.fullmatch(name) or name != name.strip():
            line = int((landmarks == name).idxmax()) + 2
            raise ValueError(
                f"{source}: line {line}: landmark_id {quoted(name)} would be another landmark "
                f"than {quoted(name.strip().partition('.')[0])}; write ids as text, not as numbers"
            )


def _only_of(
    train: pd.DataFrame, clean: pd.DataFrame, source: Path
) -> tuple[pd.DataFrame, int]:
    """Clean rows whose image is in train, and how many are not."""
    known = clean["id"].isin(train["id"])
    strange = int((~known).sum())
    if strange == len(clean):
        first = in_a_line(clean["id"].iloc[0])
        raise ValueError(f"{source}: {first} and all its other images are not in train")
    return (clean[known].reset_index(drop=True) if strange else clean), strange


def _first_generation(train: pd.DataFrame, source: Path) -> pd.DataFrame:
    refuse_repeats(train["id"], source)
    paths = _paths(train["id"], "gld_v1", source)
    return train[["id", "landmark_id"]].assign(path=paths)


def _clean_rows(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """landmark_id, images -> id and landmark_id of each image, in file order."""
    refuse_repeats(table["landmark_id"], source)
    rows = table.assign(id=table["images"].str.split())
    rows = rows.explode("id", ignore_index=True)[["id", "landmark_id"]]
    if rows["id"].isna().any():  # nothing but spaces
        landmark = rows.loc[rows["id"].isna(), "landmark_id"].iloc[0]
        raise ValueError(f"{source}: landmark {in_a_line(landmark)} has no images")
    refuse_repeats(rows["id"], source)
    return rows


def _without(
    train: pd.DataFrame, clean: pd.DataFrame, excluded: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, dict[str, int]]]:
    """Train and clean without excluded images, and how many each has lost by reason."""
    if not excluded:
        return train, clean, {}
    kept, lost = {}, {}
    for name, rows in (("full", train), ("clean", clean)):
        reason = rows["id"].map(excluded)
        counts = reason.value_counts().sort_index()
        lost[name] = {exclusions.DROPPED + why: int(n) for why, n in counts.items()}
        kept[name] = rows[reason.isna()].reset_index(drop=True)
    if kept["full"].empty:
        raise ValueError("every image of train is excluded")
    return kept["full"], kept["clean"], lost


def _labelled(
    train: pd.DataFrame, clean: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.Index]:
    """Labels, clean landmarks first in file order, and which rows of train are clean.

    Returns both tables and the landmarks by label.
    """
    first = pd.Index(clean["landmark_id"]).unique()
    others = pd.Index(train["landmark_id"]).unique().difference(first, sort=False)
    landmarks = first.append(others)
    clean["label"] = landmarks.get_indexer(clean["landmark_id"])
    clean["clean"] = 1
    train["label"] = landmarks.get_indexer(train["landmark_id"])
    # clean only under the landmark that the clean list names, not under another one
    at = pd.Index(clean["id"]).get_indexer(train["id"])
    trusted = np.append(clean["label"].to_numpy(), -1)[at]
    train["clean"] = (trusted == train["label"].to_numpy()).astype(np.int64)
    return train, clean, landmarks


def _recut(facts: Facts, cleaned: Path | None, excluded: Mapping[str, str]) -> Facts:
    """Facts of another layout with another clean list, or without excluded images.

    Labels change with it: clean landmarks come first here, too.
    """
    train = facts.train[["id", "path", "landmark_id"]]
    clean = facts.clean[["id", "path", "landmark_id"]]
    if cleaned is not None:
        table = read_csv(cleaned, ("landmark_id", "images"))
        clean = _clean_rows(table, cleaned)
        _refuse_strangers(clean["id"], train["id"], cleaned)
        at = pd.Index(train["id"]).get_indexer(clean["id"])
        clean["path"] = train["path"].to_numpy()[at]
    groups = dict(
        zip(facts.train["label"], facts.train["landmark_id"], strict=True)
    )  # label -> landmark, before
    country = {groups[label]: name for label, name in enumerate(facts.country)}
    train, clean, lost = _without(train.copy(), clean.copy(), excluded)
    train, clean, landmarks = _labelled(train, clean)
    label = pd.Index(landmarks).get_indexer(facts.index["landmark_id"])
    return replace(
        facts,
        train=train,
        clean=clean,
        index=facts.index.assign(label=label),
        country=np.array([country.get(each, OTHER) for each in landmarks], object),
        excluded=excluded,
        lost=lost,
    )


def _labels_by_name(
    categories: pd.DataFrame, landmarks: pd.Index, notes: dict[str, int]
) -> dict[str, int]:
    """Category -> label; of two landmarks with one category the first in the file."""
    labels = landmarks.get_indexer(categories["landmark_id"])
    found: dict[str, int] = {}
    taken = 0
    for text, label in zip(categories["category"], labels, strict=True):
        if label >= 0 and (name := category_name(text)):
            taken += name in found
            found.setdefault(name, int(label))
    notes["train landmarks whose category another one has"] = taken
    return found


def _official_index(
    index: pd.DataFrame,
    places: pd.DataFrame,
    categories: pd.DataFrame,
    names: Mapping[str, int],
    data: Path,
    notes: dict[str, int],
) -> pd.DataFrame:
    refuse_repeats(index["id"], data / "index/index.csv")
    refuse_repeats(places["id"], data / "index/index_image_to_landmark.csv")
    known = categories["category"].map(category_name).map(names)
    label = pd.Series(known.to_numpy(), index=categories["landmark_id"])
    label = label[~label.index.duplicated()]
    rows = index[["id"]].copy()
    rows["path"] = _paths(rows["id"], "index", data / "index/index.csv")
    rows["landmark_id"] = (
        rows["id"].map(places.set_index("id")["landmark_id"]).fillna("-1")
    )
    rows["label"] = rows["landmark_id"].map(label).fillna(-1).astype(np.int64)
    source = data / "index/index_image_to_landmark.csv"
    _compare_ids(places["id"], index["id"], notes, source, "images of index.csv")
    _compare_ids(
        *(categories["landmark_id"], places["landmark_id"], notes),
        *(data / "index/index_label_to_category.csv", f"landmarks of {source.name}"),
    )
    return rows


def _compare_ids(
    ids: Iterable[str],
    others: Iterable[str],
    notes: dict[str, int],
    source: Path,
    other: str,
) -> None:
    """Count what `source` lacks of another table's ids, and what it has besides them.

    Raises ValueError where they are the same ids, written in two forms.
    """
    here, there = set(ids), set(others)
    if not here:
        raise ValueError(f"{source}: no rows")
    refuse_other_form(ids, there, source, other)
    notes[f"{other} that {source.name} lacks"] = len(there - here)
    notes[f"{source.name} has, besides {other}"] = len(here - there)


def _countries(folder: Path, landmarks: pd.Index, notes: dict[str, int]) -> np.ndarray:
    """(C,) country code of each landmark: the last file (by name) that has it, else OTHER."""
    country = np.full(len(landmarks), OTHER, dtype=object)
    seen = np.zeros(len(landmarks), dtype=bool)
    twice = np.zeros(len(landmarks), dtype=bool)
    for path in sorted(folder.glob("*.json")):
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            members = [str(row["id"]) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: not a list of landmarks with an id ({in_a_line(error)})"
            ) from None
        _check_landmarks(pd.Series(members, dtype=object), path)
        labels = landmarks.get_indexer(members)
        labels = np.unique(labels[labels >= 0])
        twice[labels] |= seen[labels]
        seen[labels] = True
        country[labels] = path.stem
    notes["landmarks in more than one country file"] = int(twice.sum())
    notes["landmarks in no country file"] = int((~seen).sum())
    return country


def from_csv(path: Path, root: Path) -> Facts:
    """Any instance set: `path,label[,group,split]` with paths from `root`.

    split is train (where absent), index or query; a label may be empty in index (a distractor);
    group plays the country. Every third query is Public, the others Private.
    """
    table = read_csv(path, ("path", "label"), ("group", "split"))
    for name, default in (("group", OTHER), ("split", "train")):
        if name not in table:
            table[name] = default
    strange = table.loc[~table["split"].isin(SPLITS), "split"]
    if len(strange):
        raise ValueError(
            f"{path}: split {quoted(strange.iloc[0])} is not one of {', '.join(SPLITS)}"
        )
    nameless = (table["label"] == "") & (table["split"] == "train")
    if nameless.any():
        raise ValueError(
            f"{path}: line {int(nameless.idxmax()) + 2} is of train without a label"
        )
    return _from_table(table.assign(path=_checked_paths(table, path, root)), path, root)


def _checked_paths(table: pd.DataFrame, source: Path, root: Path) -> list[str]:
    """Paths from `root`; an absolute one inside it is made so, what can be no file is refused."""
    base = f"{root.absolute().as_posix()}/"
    found = []
    for number, name in enumerate(table["path"], 2):
        reason = ""
        name = name.removeprefix(base)
        if not name.strip():
            reason = "there is no path"
        elif "\\" in name:
            reason = f"path {quoted(name)} has a backslash; separate folders by /"
        elif name.startswith("/") or re.match(r"[A-Za-z]:/", name):
            reason = f"path {quoted(name)} is absolute and not inside {root}"
        if reason:
            raise ValueError(f"{source}: line {number}: {reason}")
        found.append(posixpath.normpath(name))
    folders = {folder for name in set(found) for folder in _parents(name)}
    for number, name in enumerate(found, 2):
        if name in folders or name == ".":
            raise ValueError(
                f"{source}: line {number}: {quoted(name)} is a folder, not an image"
            )
    return found


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path
        if path == "/":
            return


def from_folders(root: Path, held_out: int = 3) -> Facts:
    """A folder per class; `root` may hold train/, index/ and query/ with the classes inside.

    Without these splits every `held_out`-th class is kept from training (0: none is); a quarter of
    its images (at least one) are queries and the others the index. What is no photograph is left
    out and counted in `notes`: leftovers of systems, and extensions that the decoder does not read.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; give the one with the classes"
        )
    tops = sorted(p for p in root.glob("*") if p.is_dir() and not _is_leftover(p.name))
    _refuse_other_case(root, [p.name for p in tops])
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    split_up = not missing
    if 0 < len(missing) < len(SPLITS):
        raise FileNotFoundError(
            f"{root}: no folder {', '.join(missing)} beside the other splits; "
            f"give all of {', '.join(SPLITS)}, or one folder a class"
        )
    folders = tops
    if split_up:
        folders = sorted(
            p
            for split in SPLITS
            for p in (root / split).glob("*")
            if p.is_dir() and not _is_leftover(p.name)
        )
    found = []
    notes: Counter[str] = Counter()
    if split_up:
        notes["left out: folder beside the splits"] = len(tops) - len(SPLITS)
    above = [root / split for split in SPLITS] if split_up else [root]
    notes["left out: photograph in no class folder"] = sum(
        bool(PICTURE.search(p.name)) and not _is_leftover(p.name) and p.is_file()
        for folder in above
        for p in folder.iterdir()
    )
    for number, folder in enumerate(folders):
        pictures = find_photographs(folder, notes)
        notes["left out: class without a photograph"] += not pictures
        queries = max(1, len(pictures) // 4)
        for place, picture in enumerate(pictures):
            split = folder.parent.name if split_up else "train"
            if not split_up and held_out and number % held_out == held_out - 1:
                split = "query" if place < queries else "index"
            name = picture.relative_to(root).as_posix()
            _refuse_odd_name(root, name)
            found.append((name, folder.name, OTHER, split))
    if not found:
        raise FileNotFoundError(f"{root}: no folder with images in it")
    table = pd.DataFrame(
        found, columns=["path", "label", "group", "split"], dtype=object
    )
    facts = _from_table(table, root, root)
    facts.notes.update({reason: count for reason, count in notes.items() if count})
    if not split_up and len(folders) < held_out:
        facts.notes[f"{NONE_HELD_OUT} {held_out} is, and there are"] = len(folders)
    return facts


def find_photographs(folder: Path, notes: Counter[str]) -> list[Path]:
    """Files below `folder` by whose names the decoder reads them, sorted; `notes` counts the others."""
    found = []
    for here, folders, names in os.walk(folder):
        notes["left out: hidden, or left by a system"] += len(names) + len(folders)
        folders[:] = [name for name in folders if not _is_leftover(name)]
        notes["left out: folder behind a link, inside a class"] += sum(
            os.path.islink(os.path.join(here, name)) for name in folders
        )
        names = [name for name in names if not _is_leftover(name)]
        notes["left out: hidden, or left by a system"] -= len(names) + len(folders)
        for name in names:
            path = Path(here, name)
            if PICTURE.search(name):
                # a pipe would be waited for; a link that leads nowhere counts as missing
                if path.is_file() or path.is_symlink():
                    found.append(path)
                else:
                    notes["left out: no plain file"] += 1
                continue
            ending = PurePath(name).suffix.lower() or "no extension"
            notes[
                f"left out: {in_a_line(ending)}, which the decoder does not read"
            ] += 1
    return sorted(found)


def _is_leftover(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in LEFTOVERS


def _refuse_other_case(root: Path, names: Iterable[str]) -> None:
    """Raise ValueError for Train/ or QUERY/, which are splits or classes: nobody but the user knows."""
    for name in names:
        if name not in SPLITS and name.strip().lower() in SPLITS:
            raise ValueError(
                f"{root}: {quoted(name)} looks like the split {name.strip().lower()}/ in another "
                f"spelling; rename it to {name.strip().lower()}, or, if it is a class, to another name"
            )


def _refuse_odd_name(root: Path, name: str) -> None:
    """Raise ValueError for a path that no list can hold: line ends, or bytes that are not UTF-8."""
    if name.isprintable():
        return
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{root}: {os.fsencode(name)!r} is not UTF-8; rename it")
    if any(c in name for c in LINE_ENDS):
        raise ValueError(
            f"{root}: {quoted(name)} has a line end or a control character in its name; "
            "rename it"
        )


def path_id(path: str) -> str:
    """The id of an image that a table names by its path: sixteen digits of the path's hash."""
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def _from_table(table: pd.DataFrame, source: Path, root: Path) -> Facts:
    """path, label, group, split of every image -> facts; labels as they appear."""
    if table.empty:
        raise ValueError(f"{source}: no rows")
    paths = table["path"].map(posixpath.normpath)  # one photo has one spelling
    foreign = paths[paths.str.startswith(("/", ".."))]
    if len(foreign):
        raise ValueError(
            f"{source}: {in_a_line(foreign.iloc[0])} is not a path inside {root}"
        )
    table = table.assign(path=paths)
    refuse_repeats(paths, source)
    # the name of a file is no id: sixteen digits of its hash are, and always the same
    table = table.assign(id=table["path"].map(path_id))
    train, index, query = (
        table[table["split"] == split].reset_index(drop=True) for split in SPLITS
    )
    labels, names = pd.factorize(train["label"])
    groups = train.drop_duplicates("label")["group"].to_numpy(dtype=object)
    known = index[index["label"] != ""].groupby("label")["id"]
    positives = {label: " ".join(ids) for label, ids in known}
    answers = np.array(
        [positives.get(label, "") for label in query["label"]], dtype=object
    )
    usage = np.where(np.arange(len(query)) % 3 == 0, "Public", "Private")
    solution = pd.DataFrame(
        {
            "id": query["id"],
            "images": answers,
            "usage": np.where(answers == "", "Ignored", usage),
        }
    )
    train = train.assign(landmark_id=train["label"], label=labels, clean=1)
    train = train[["id", "path", "landmark_id", "label", "clean"]]
    known = pd.Index(names).get_indexer(index["label"])
    index = index.assign(landmark_id=index["label"].replace("", "-1"), label=known)
    index = index[["id", "path", "landmark_id", "label"]]
    for rows in (train, index, query):
        _refuse_wrong_root(rows, root)
    clean = train.sort_values("label", kind="stable", ignore_index=True)
    sources = {
        f"{source.name} ({split})": int((table["split"] == split).sum())
        for split in SPLITS
    }
    known = pd.Index(names).get_indexer(query["label"]) >= 0
    recognition = pd.DataFrame(
        {
            "id": query["id"],
            "landmarks": np.where(known, query["label"].map(encode_label), ""),
            "usage": usage,
        }
    )
    facts = Facts(
        train, clean, index, query[["id", "path"]], solution, groups, sources, {}
    )
    return replace(facts, recognition=recognition)


def _empty(*columns: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: pd.Series(dtype="int64" if name in ("label", "clean") else object)
            for name in columns
        }
    )


def _paths(ids: pd.Series, split: str, source: Path) -> pd.Series:
    """split/a/b/c/<id>.jpg; an id that is not sixteen hex digits is refused, it names a file."""
    names = ids.tolist()
    wrong = next((name for name in names if not ID.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(f"{source}: {quoted(wrong)} is not an id of 16 hex digits")
    found = [f"{split}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg" for name in names]
    return pd.Series(found, ids.index, dtype=ids.dtype)


def _refuse_strangers(ids: pd.Series, train: pd.Series, source: Path) -> None:
    strange = ids[~ids.isin(train)]
    if len(strange):
        first = in_a_line(strange.iloc[0])
        raise ValueError(f"{source}: {first} is not an image of train")


def _refuse_wrong_root(rows: pd.DataFrame, data: Path) -> None:
    """Raise FileNotFoundError where the first hundred images and a thousand others are missing."""
    reader = open_reader(data)

    def there(paths: pd.Series) -> bool:
        return any(reader.exists(path) for path in paths)

    # evenly spaced: of a part of the data, one run of ids may be what is there
    others = rows["path"].iloc[100 :: max(1, len(rows) // 1000)]
    if len(rows) and not there(rows["path"].head(100)) and not there(others):
        tried = min(100, len(rows)) + len(others)
        raise FileNotFoundError(
            f"{data}: {rows['path'].iloc[0]} is not there, and none of {tried} images of "
            f"{len(rows)} that were looked for; is this the folder that their paths start from "
            "(of GLDv2, the one that holds train/, index/ and test/)?"
        )
