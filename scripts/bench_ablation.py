"""Rows of the suite `ablation`: losses, samplers and augmentations at equal samples seen.

One stage on the packages photos (LANDMARK_DATA names their folder), trained anew with one thing
changed, three seeds each; the row's ratio is its private mAP@100 against the plain stage's.
As many trials at once as there are GPUs, or cores.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, Row

from kit import tune
from kit.answers.trial import Search
from kit.data import lists, sources, tables
from kit.data.augment import Augment
from kit.training import recipes
from kit.training.job import Job, change

SAMPLES, EPOCHS, SIDE, SEEDS = 2_100, 3, 96, (0, 1, 2)
PLAIN = {"crop": 0.4, "jitter": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "loss: cosface": {"loss": "cosface"},
    "loss: softmax": {"loss": "softmax"},
    "loss: adacos": {"loss": "adacos"},
    "loss: 3 sub-centres": {"centres": 3},
    "loss: margins by class": {"margin": 0.05, "rare_margin": 0.45},
    "loss: label smoothing 0.1": {"smoothing": 0.1},
    "loss: batch-hard triplet beside": {"triplet": 0.3},
    "order: class-balanced": {"order": "class_balanced"},
    "order: P x K": {"order": "pxk"},
    "order: continent quota": {"order": "continent", "fill": True},
    "augment: flip only": {"crop": 1.0, "jitter": 0.0},
    "augment: random erasing": {"erase": 1.0},
    "augment: 2021 (pad, erase)": {"crop": 1.0, "jitter": 0.0, "pad": 6, "erase": 1.0},
    "augment: 2019 soft": {"crop": 1.0, "jitter": 0.0, "crop_scale": 0.2}
    | {"brightness": 0.1},
    "augment: RandAugment": {"rand_augment": 1.0},
}


def rows(bench: Bench) -> Iterator[Row]:
    data = ROOT / os.environ.get("LANDMARK_DATA", "none") / "packages"
    if not data.is_dir():
        yield bench.missing("ablation", "LANDMARK_DATA names no folder with packages/")
        return
    variants = dict(list(VARIANTS.items())[:2]) if bench.quick else VARIANTS
    with tempfile.TemporaryDirectory() as name:
        job = _job(data, Path(name), 1 if bench.quick else EPOCHS)
        seeds = SEEDS[:1] if bench.quick else SEEDS
        search = Search(job, Path(name) / "tune", seeds, keep="none")
        spaces = [
            {field: [value] for field, value in fields.items()}
            for fields in (PLAIN, *variants.values())
        ]
        places = torch.cuda.device_count() or len(os.sched_getaffinity(0))
        tune.tune(spaces, search, gpus=places)
        header, found = tune.table(search.folder)
    by_trial = {row[0]: dict(zip(header, row, strict=True)) for row in found}
    plain = by_trial[0]["private"]
    for number, what in enumerate(("plain", *variants)):
        trial = by_trial[number]
        if trial["state"] != "done":
            yield bench.missing(what, trial["error"])
            continue
        told = f"{what:32} {trial['private']:.4f} +- {trial['private_spread'] or 0:.4f}"
        yield bench.row(told, trial["private"] / plain, 0.0, False)


def _job(data: Path, folder: Path, epochs: int) -> Job:
    """The demo's network on the noisy list: as many samples for every variant."""
    continents = tables.read_continents(ROOT / "datasets_meta" / "continents.csv")
    lists.build(sources.official(data), data, folder / "lists", continents)
    recipe = recipes.get("toy")
    stage = change(
        recipe.stages[0],
        images="c2x",
        size=SIDE,
        eval_size=112,
        epochs=epochs,
        epoch_size=SAMPLES // EPOCHS,
    )
    stage = change(replace(stage, augment=Augment()), **PLAIN)
    runs = folder / "runs"
    return Job(
        stage, recipe.net, folder / "lists", data, runs, workers=0, save_every=10_000
    )


ROWS = [rows]
