"""A config in, a synthetic GLDv2 out: rendered landmarks in the official layout.

A landmark is a building put together from blocks with drawn facades; those of a country
share a style. Every image sees one from a side, in a light and a crop of its own.
"""

import argparse
import csv
import hashlib
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from kit.data.scenes import STYLES, Style, building, photograph
from kit.files import read_json, write_json, write_text


@dataclass(frozen=True)
class ToyConfig:
    """Sizes and noise of a set; one config gives the same bytes every time."""

    landmarks: int = 60  # in train_clean.csv or asked for by a query
    images: int = 900  # of train, index and test together
    side: int = 256  # longest side of an image, pixels
    seed: int = 0
    wrong: float = 0.08  # share of a clean landmark's images that show something else
    missed: float = 0.1  # share of them that are right, yet not in train_clean.csv
    noise: float = 0.08  # share of train under labels that are noise only
    distractors: float = 0.25  # share of index that answers no query
    ignored: float = 0.1  # share of test without a landmark


class Shot(NamedTuple):
    """One image: why it is there, the place it shows, and the one it is filed under."""

    split: str
    kind: str  # clean, missed, wrong, noise; answer, distractor; query, ignored
    shows: int
    label: int
    id: str
    odd: str  # what is unusual about the file


WIKI = "http://commons.wikimedia.org/wiki/Category:"
SPLITS = ("train", "index", "test")
NOTHING = -1  # the place of a picture without a landmark
ODD = {  # unusual files, where they cannot change a score
    "noise": ("truncated", "empty", "grey", "png"),
    "distractor": ("truncated", "empty"),
}


def render(root: Path, config: ToyConfig = ToyConfig(), workers: int = 0) -> Path:
    """Writes the set to `root`, unless it is there already, and returns `root`.

    The files do not depend on the number of workers (threads; 0: one a core).
    """
    marker, made_by = root / "toy.json", asdict(config)
    if marker.exists() and read_json(marker)["config"] == made_by:
        return root
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(
            f"{root} does not hold {config}: empty it or name another folder"
        )
    shots = sorted(plan(config), key=lambda shot: shot.shows)  # a place is built once
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            files = pool.map(lambda shot: _file(config, shot), shots)
            for shot, data in zip(shots, files, strict=True):
                path = part / shot.split / Path(*shot.id[:3]) / f"{shot.id}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        _write_tables(part, config, sorted(shots, key=lambda shot: shot.id))
        counts = Counter(sorted(f"{shot.split} {shot.kind}" for shot in shots))
        write_json(part / "toy.json", {"config": made_by, "counts": counts})
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def plan(config: ToyConfig) -> list[Shot]:
    """Every image of the set. Places are numbered: those clean in train, those only the
    index knows, labels that are noise only, and then whatever else is seen."""
    n = config.landmarks
    if n < 4 or config.images < 10 * n or config.side < 32:
        raise ValueError(
            f"{config} is too small: at least 4 landmarks, 10 images for each, side 32"
        )
    rng = default_rng([config.seed, 0])
    clean, asked = range(n - round(0.3 * n)), range(max(1, n // 10), n)
    noisy = range(n, n + max(1, n // 5))
    elsewhere = count(noisy.stop)
    test, index = round(0.2 * config.images), round(0.34 * config.images)
    train = config.images - test - index
    noise = max(5, round(config.noise * train))
    wrong = max(1, round(config.wrong * (train - noise)))
    missed = round(config.missed * (train - noise))
    answers = max(3 * len(asked), round((1 - config.distractors) * index))
    ignored = max(1, round(config.ignored * test))

    def other(place: int) -> int:
        another = (place + int(rng.integers(1, n))) % n
        return (NOTHING, another, another, next(elsewhere))[rng.integers(4)]

    kept = _spread(rng, train - noise - wrong - missed, clean, 3)
    rows = [("train", "clean", p, p) for p in kept]
    rows += [("train", "missed", p, p) for p in rng.choice(kept, missed).tolist()]
    rows += [("train", "wrong", other(p), p) for p in rng.choice(clean, wrong).tolist()]
    rows += [("train", "noise", other(p), p) for p in _spread(rng, noise, noisy, 1)]
    rows += [("index", "answer", p, p) for p in _spread(rng, answers, asked, 3)]
    pairs = np.repeat([next(elsewhere) for _ in range(index)], 2)[: index - answers]
    rows += [("index", "distractor", p, p) for p in pairs.tolist()]
    rows += [("test", "query", p, p) for p in _spread(rng, test - ignored, asked, 1)]
    rows += [("test", "ignored", NOTHING, NOTHING)] * ignored
    shots, seen = [], Counter()
    for split, kind, *places in rows:
        odd = [*ODD.get(kind, ())[seen[kind] :], ""][0]
        name = _image_id(config.seed, split, seen[split])
        shots.append(Shot(split, kind, *places, name, odd))
        seen.update((split, kind))
    return shots


def _spread(rng: Generator, total: int, places: range, least: int) -> list[int]:
    """`total` places: each of them `least` times or more, some of them often."""
    rest = total - least * len(places)
    if rest < 0:
        raise ValueError(
            f"{total} images cannot show {len(places)} places {least} times each: "
            "ask for more images or smaller shares of noise"
        )
    weights = 1 / (5 + rng.permutation(len(places)))
    times = least + rng.multinomial(rest, weights / weights.sum())
    return np.repeat(places, times).tolist()


def _image_id(seed: int, split: str, n: int) -> str:
    """16 hex digits; the first two of a split look like an integer and like a float."""
    digit = SPLITS.index(split) + 5
    numbers = (f"000000000001234{digit}", f"12345678901{digit}e345")
    key = f"{seed} {split} {n}".encode()
    return numbers[n] if n < 2 else hashlib.blake2b(key, digest_size=8).hexdigest()


def _style(config: ToyConfig, place: int) -> Style:
    return STYLES[place % min(len(STYLES), max(4, config.landmarks // 4))]


def _name(place: int) -> str:
    """A category as its URL spells it: some have commas, some are percent-encoded."""
    syllables = ("ka", "lö", "mi", "ré", "su", "ta", "vo", "ny", "de", "bu")
    word = "".join(syllables[int(digit)] for digit in str(place + 10)).capitalize()
    kinds = ("{}_Castle", "{},_town_hall", "Tower_of_{}", "{}_(gate)", "Saint_{}'s")
    return quote(kinds[place % len(kinds)].format(word), safe="_,()")


def _file(config: ToyConfig, shot: Shot) -> bytes:
    rng = default_rng([config.seed, 1, int(shot.id, 16)])
    style = _style(config, shot.shows)
    subject = () if shot.shows == NOTHING else building(config.seed, shot.shows, style)
    image = photograph(rng, subject, config.side)
    if shot.odd == "grey":
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
    suffix, options = (".png", []) if shot.odd == "png" else (".jpg", quality)
    data = cv2.imencode(suffix, image, options)[1].tobytes()
    return data[: {"truncated": len(data) // 2, "empty": 0}.get(shot.odd)]


def _write_tables(root: Path, config: ToyConfig, shots: list[Shot]) -> None:
    """The official CSV and JSON files. Train and index number places differently, with
    the same numbers: only the category joins them."""
    train, index, test = ([s for s in shots if s.split == split] for split in SPLITS)
    labels = sorted({s.label for s in train + index})
    numbers = default_rng([config.seed, 2]).permutation(5 * len(labels))[: len(labels)]
    in_train = dict(zip(labels, numbers.tolist(), strict=True))
    in_index = dict(zip(labels, np.roll(numbers, 1).tolist(), strict=True))
    known = sorted({s.label for s in train}, key=in_train.get)
    found = sorted({s.label for s in index}, key=in_index.get)
    images: dict[tuple[str, int], list[str]] = {}
    for s in shots:
        images.setdefault((s.kind, s.label), []).append(s.id)
    clean = [p for p in known if ("clean", p) in images]
    queries = [s for s in test if s.kind == "query"]
    usage = {s.id: "Private" for s in test} | {s.id: "Public" for s in queries[::3]}

    def write(name: str, header: str, rows: Iterable[tuple]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows])
        write_text(root / name, text.getvalue())

    rows = [(s.id, f"https://example.org/{s.id}.jpg", in_train[s.label]) for s in train]
    write("train/train.csv", "id,url,landmark_id", rows)
    rows = [(in_train[p], " ".join(images["clean", p])) for p in clean]
    write("train/train_clean.csv", "landmark_id,images", rows)
    rows = [(in_train[p], WIKI + _name(p)) for p in known]
    write("train/train_label_to_category.csv", "landmark_id,category", rows)
    for country in {_style(config, p).country for p in known}:
        here = [p for p in known if _style(config, p).country == country]
        places = [{"id": in_train[p], "name": _name(p)} for p in here]
        write_json(root / f"train/country/{country}.json", places)
    write("index/index.csv", "id", [(s.id,) for s in index])
    rows = [(s.id, in_index[s.label]) for s in index]
    write("index/index_image_to_landmark.csv", "id,landmark_id", rows)
    rows = [(in_index[p], WIKI + _name(p)) for p in found]
    write("index/index_label_to_category.csv", "landmark_id,category", rows)
    write("test/test.csv", "id", [(s.id,) for s in test])
    rows = [(s.id, " ".join(images["answer", s.label]), usage[s.id]) for s in queries]
    rows += [(s.id, "None", "Ignored") for s in test if s.kind == "ignored"]
    write("test/retrieval_solution_v2.1.csv", "id,images,Usage", rows)
    answer = {p: in_train[p] for p in clean}
    rows = [(s.id, answer.get(s.label, ""), usage[s.id]) for s in test]
    write("test/recognition_solution_v2.1.csv", "id,landmarks,Usage", rows)
    rows = [(s.split, s.id, s.odd) for s in shots if s.odd]
    write("odd_files.csv", "split,id,kind", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name in ("landmarks", "images", "side", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(ToyConfig, name))
    options = vars(parser.parse_args())
    try:
        print(render(options.pop("folder"), ToyConfig(**options)))
    except (ValueError, OSError) as error:
        sys.exit(f"toy: {error}")


if __name__ == "__main__":
    main()
