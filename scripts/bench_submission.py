"""Rows of the suite `submission`: memory of the whole notebook, with synthetic references.

KIT_DEMO names a work folder of the recipe KIT_RECIPE (toy) on photos of packages, which lie in
LANDMARK_DATA. Its two last models get references of random vectors; the build is rehearsed in a
sandbox that ends it above 3 GB.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench import ROOT, Bench, Row

from kit import files
from kit.data import lists
from kit.features import store
from kit.kaggle import build, contents
from kit.kaggle.rehearse import Rehearsal, rehearse
from kit.kaggle.sandbox import Limits
from kit.plan import VOTERS, Run
from kit.rerank import chain
from kit.rerank.steps import LandmarkCountry

ALLOWED, LIMIT = 2.5, 3.0  # GB of anonymous memory: the goal, and where a run is ended
GROWN = 0.9  # memory at a million references, of that at two
BLOCK, LANDMARKS = 512, 81_313


def memory_rows(bench: Bench) -> Iterator[Row]:
    """One and two million references of two models of 512 numbers."""
    demo, photos = os.environ.get("KIT_DEMO"), os.environ.get("LANDMARK_DATA")
    if not demo or not photos:
        yield bench.missing("submission", "KIT_DEMO or LANDMARK_DATA names no folder")
        return
    recipe, data = os.environ.get("KIT_RECIPE", "toy"), Path(photos) / "packages"
    peaks = []
    for number in (100_000, 200_000) if bench.quick else (1_000_000, 2_000_000):
        with tempfile.TemporaryDirectory() as folder:
            run = _work(Run(recipe, data, Path(demo)), Path(folder) / "work", number)
            done = _rehearsed(run, Path(folder) / "build")
        if not done.ok:
            raise RuntimeError(f"{done.problem}\n{done.error}")
        peaks.append(done.peak_gb)
        name = f"{number:,} references x 2 models: {ALLOWED} / {done.peak_gb:.2f} GB"
        yield bench.row(name, ALLOWED / done.peak_gb, 1.0, False)
        first = f"{done.first_valid_s:.1f} s to a valid file, {done.seconds:.0f} s"
        yield bench.told(f"{number:,} references", times=first)
    yield bench.row("memory, half of the references", peaks[0] / peaks[1], GROWN, False)


def _rehearsed(run: Run, out: Path) -> Rehearsal:
    found = contents.find(run, VOTERS)
    order = build.Order("somebody", contents.slug(run.recipe))
    notebook = ROOT / "notebooks" / "05_submission.ipynb"
    build.build(out, found, order, ROOT, notebook)
    return rehearse(out, run.data, limits=Limits(memory=LIMIT))


def _work(demo: Run, work: Path, number: int) -> Run:
    """A work folder with the demo's two last models, a chain, and so many references."""
    run = replace(demo, work=work)
    models = list(demo.stages)[::-1][:2]
    listed = _list(run, number)
    for model in models:
        shutil.copytree(demo.runs / model, run.runs / model)
        known = next(
            path
            for path in sorted((demo.features / model).glob("*/manifest.json"))
            if path.parent.name.startswith(VOTERS)
        )
        _features(run.features / model / VOTERS, listed, files.read_json(known))
    steps = (LandmarkCountry(),)
    chain.save(chain.Chain(dict.fromkeys(models, 1.0), steps), run.chain)
    return run


def _list(run: Run, number: int) -> lists.ImageList:
    path = run.lists / f"{VOTERS}.csv"
    path.parent.mkdir(parents=True)
    labels = np.random.default_rng(0).integers(0, LANDMARKS, number)
    with path.open("w") as file:
        file.write(",".join(lists.COLUMNS) + "\n")
        for row, label in enumerate(labels.tolist()):
            name = f"{row:016x}"
            file.write(f"{name},train/{name}.jpg,{label},{label},1,FR,Europe,-1,-1\n")
    lists.describe_file(path, {"name": VOTERS, "rows": number})
    return lists.load(run.lists, VOTERS, ("id",))


def _features(folder: Path, images: lists.ImageList, about: dict) -> None:
    facts = {
        name: value
        for name, value in about.items()
        if name
        not in ("complete", "unreadable", "kit", "rows", "dim", "block")
        + ("checksums", "seal")
    } | {"list": {"name": images.name, "hash": images.hash}}
    store.create(folder, images.ids, about["dim"], BLOCK, facts)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", mode="r+")
    random = np.random.default_rng(1)
    for start in range(0, len(vectors), 16_384):
        some = random.standard_normal((16_384, about["dim"]), np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
        vectors[start : start + 16_384] = some[: len(vectors) - start]
    np.lib.format.open_memmap(folder / "done.npy", mode="r+")[:] = 1
    store.finish(folder)


ROWS = [memory_rows]
