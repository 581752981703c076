"""Rows of the suite `lists`: image lists at GLDv2's true size, of tables alone.

The tables have the official counts, random ids and a long tail of landmarks. They are read and
cut into lists in a process of their own, without images and sizes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import ROOT, Bench, Row

from kit import files
from kit.data import lists, sources, tables

SECONDS, GIGABYTES = 150, 4.0  # allowed
ANSWERED = 1_129  # queries with positives in the index
COUNTRIES = ("FR", "JP", "NA", "BR", "US")
ADDRESS = "https://upload.wikimedia.org/wikipedia/commons/0/0a/A_place_seen_from_{}.jpg"
WIKI = "http://commons.wikimedia.org/wiki/Category:Place_number_{}"


def build_rows(bench: Bench) -> Iterator[Row]:
    """All lists; quick: of a fiftieth of the rows."""
    whole = files.read_json(ROOT / "datasets_meta" / "gldv2.json")
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "lists"
        write_tables(data, whole, 0.02 if bench.quick else 1.0)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, data, out], check=True, stdout=subprocess.PIPE
        )
        seconds = time.perf_counter() - started
    gigabytes, said, rows = json.loads(done.stdout.splitlines()[-1])
    yield bench.told("tables of GLDv2's counts", said=said, rows=f"{rows:,}")
    name = f"all lists: {SECONDS} / {seconds:.0f} s"
    yield bench.row(name, SECONDS / seconds, 1.0, False)
    name = f"memory of it: {GIGABYTES:g} / {gigabytes:.2f} GB"
    yield bench.row(name, GIGABYTES / gigabytes, 1.0, False)


def write_tables(
    data: Path, whole: dict[str, Any], share: float, seed: int = 0
) -> None:
    """Writes a data folder without images, with `share` of the rows of each table."""
    rng = np.random.default_rng(seed)

    def count(number: int) -> int:
        return int(number * share)

    train, clean = whole["train"], whole["clean"]
    landmarks = count(train["landmarks"])
    sizes = [count(n) for n in (train["images"], whole["index"], whole["test"])]
    ids, index, test = np.split(_ids(sum(sizes), rng), np.cumsum(sizes)[:2])
    labels = _long_tail(len(ids), landmarks, rng)
    named = zip(ids, labels.tolist(), strict=True)
    rows = (f"{i},{ADDRESS.format(n)},{at}" for n, (i, at) in enumerate(named))
    _write(data / "train/train.csv", "id,url,landmark_id", rows)
    rows = _clean(ids, labels, count(clean["landmarks"]), count(clean["images"]))
    _write(data / "train/train_clean.csv", "landmark_id,images", rows)
    rows = (f"{n},{WIKI.format(n)}" for n in range(landmarks))
    _write(data / "train/train_label_to_category.csv", "landmark_id,category", rows)
    for at, code in enumerate(COUNTRIES):
        members = range(at, landmarks, len(COUNTRIES) + 1)
        found = [{"id": n, "name": f"Place_number_{n}"} for n in members]
        files.write_json(data / f"train/country/{code}.json", found)
    _searched(data, index, test, landmarks, count(ANSWERED), rng)


def _searched(
    data: Path,
    index: np.ndarray,
    test: np.ndarray,
    landmarks: int,
    answered: int,
    rng: np.random.Generator,
) -> None:
    """Tables of index and test: a fifth of the index shows places that train does not know."""
    places = rng.integers(landmarks * 5 // 4, size=len(index))
    own = 1_000_000  # index numbers its landmarks otherwise
    _write(data / "index/index.csv", "id", index)
    named = zip(index, places.tolist(), strict=True)
    rows = (f"{i},{own + at}" for i, at in named)
    _write(data / "index/index_image_to_landmark.csv", "id,landmark_id", rows)
    rows = (f"{own + n},{WIKI.format(n)}" for n in np.unique(places).tolist())
    _write(data / "index/index_label_to_category.csv", "landmark_id,category", rows)
    _write(data / "test/test.csv", "id", test)
    asked = places[rng.choice(len(index), size=answered)]
    halves = np.where(np.arange(answered) % 3 == 0, "Public", "Private")
    found = [" ".join(index[places == place]) for place in asked]
    rows = [f"{i},{one},{h}" for i, one, h in zip(test, found, halves, strict=False)]
    rows += [f"{i},None,Ignored" for i in test[answered:]]
    _write(data / "test/retrieval_solution_v2.1.csv", "id,images,Usage", rows)
    shown = ["" if place >= landmarks else place for place in asked.tolist()]
    rows = [f"{i},{one},{h}" for i, one, h in zip(test, shown, halves, strict=False)]
    rows += [f"{i},,Private" for i in test[answered:]]
    _write(data / "test/recognition_solution_v2.1.csv", "id,landmarks,Usage", rows)


def _ids(number: int, rng: np.random.Generator) -> np.ndarray:
    """(number,) different ids of 16 hex digits."""
    found: dict[str, None] = {}
    while len(found) < number:
        more = rng.integers(0, 2**64, size=number - len(found), dtype=np.uint64)
        found.update(dict.fromkeys(f"{n:016x}" for n in more.tolist()))
    return np.array(list(found), dtype=object)


def _long_tail(images: int, landmarks: int, rng: np.random.Generator) -> np.ndarray:
    """(images,) labels, each at least once, the first ones most often."""
    weights = 1 / np.arange(1, landmarks + 1) ** 0.6
    more = rng.choice(landmarks, images - landmarks, p=weights / weights.sum())
    labels = np.concatenate([np.arange(landmarks), more])
    rng.shuffle(labels)
    return labels


def _clean(
    ids: np.ndarray, labels: np.ndarray, landmarks: int, images: int
) -> Iterator[str]:
    """Of the most frequent landmarks about the same share of images each, `images` in all."""
    by_label = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_label], np.arange(labels.max() + 2))
    chosen = np.argsort(-np.diff(starts), kind="stable")[:landmarks]
    counts = np.diff(starts)[chosen]
    ends = np.round(np.cumsum(counts) * (images / counts.sum())).astype(int)
    for at, kept in zip(chosen, np.diff(ends, prepend=0), strict=True):
        yield f"{at},{' '.join(ids[by_label[starts[at] : starts[at] + kept]])}"


def _write(path: Path, head: str, lines: Iterable[str]) -> None:
    with files.replacing(path) as temporary, temporary.open("w") as file:
        file.write(head + "\n")
        file.writelines(f"{line}\n" for line in lines)


def build(data: Path, out: Path) -> None:
    """Builds the lists and prints the most memory (GB), what was read, and the rows written."""
    facts = sources.read(data, there=False)
    meta = ROOT / "datasets_meta"
    said = sources.completeness(facts, files.read_json(meta / "gldv2.json"))
    continents = tables.read_continents(meta / "continents.csv")
    counts = lists.build(facts, data, out, continents, sizes=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps([peak, said, sum(counts.values())]))


ROWS = (build_rows,)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    build(**vars(parser.parse_args()))
