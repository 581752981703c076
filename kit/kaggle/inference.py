"""Features of a run's queries and index, by what there is time for.

A first look at the photos tells what an image costs. Where all models at all scales would take too
long, the plan steps down: fewer scales first, then fewer models. Whatever was not finished in time
counts as unreadable, so that the rest is searched.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from kit import config, launch
from kit.data import lists
from kit.features import extract, fill, store
from kit.features.views import Views
from kit.kaggle import budget, rates, stepdown
from kit.kaggle.entry import Entry
from kit.models import net as nets
from kit.plan import INDEX, QUERY
from kit.rerank.chain import Chain
from kit.rerank.recogniser import Recogniser

Plan = TypeVar("Plan", Chain, Recogniser)

LOOK, SHARE = 30.0, 0.002  # seconds of the first look at most, and of the time left
EACH = 0.01  # seconds of it for every image there is
AFTER = ("search", "tag", "rerank", "write")  # of a budget's steps
MARGIN = 1.5  # how much longer these may take than expected
BLOCKS = 2  # of extraction that there must be time for at the least
FEW = 4  # images at a time of the first look on cores, which take long for each
UNKNOWN = 0.3  # of the time that is left, kept for them where nothing is measured


def extracted(
    entry: Entry,
    chain: Plan,
    views: Views,
    reference: str = "",
    known: str = "",
    batch: int = 32,
    workers: int = 0,
    shown: tuple[str, ...] = (QUERY, INDEX),
) -> tuple[Plan, Views]:
    """Extracts queries and index; the plan and the views that there was time for.

    reference: the list that votes. known: the list whose features travelled; its images are
    not looked at again. workers: loader processes of each GPU; 0 for as many as there are cores
    for it, and none where the cores are all there is. shown: the lists that are extracted.
    """
    place = entry.place
    if not workers and entry.gpus:
        workers = max(1, (os.cpu_count() or 1) // entry.gpus)
    job = extract.Job(
        runs=place.runs,
        models=tuple(sorted(chain.models, key=chain.models.__getitem__, reverse=True)),
        lists=place.lists,
        images=QUERY,
        data=place.data,
        features=place.features,
        views=views,
        batch=batch,
        workers=workers,
        max_unreadable=1.0,  # what can be read is answered
        known=(known,) if known else (),
    )
    taken, after = _plan(entry, job, reference, shown)
    print(taken.statement)
    job = replace(job, models=taken.models, views=replace(views, scales=taken.scales))
    os.environ[launch.STOP_AT] = str(entry.ends - after)
    for images in shown:
        _extract(replace(job, images=images), max(1, entry.gpus))
    weights = {name: w for name, w in chain.models.items() if name in taken.models}
    return replace(chain, models=weights), job.views


def _extract(job: extract.Job, processes: int) -> None:
    try:
        launch.launch(
            "kit.features.extract",
            [str(job.write())],
            processes=processes,
            logs=job.folder / "logs",
        )
    except launch.Stopped as stopped:
        try:
            lacking = extract.settle(job)
        except RuntimeError as nothing:  # there is nothing to settle for
            raise stopped from nothing
        print(f"{job.images}: the time is over, without {lacking:,} images")


def _plan(
    entry: Entry, job: extract.Job, reference: str, shown: tuple[str, ...]
) -> tuple[stepdown.Plan, float]:
    """What there is time for, and the seconds that are kept for everything after it."""
    nothing = np.array([], "U16")
    travelled = [
        store.load(job.features / job.models[0] / name).ids for name in job.known
    ]
    ids = {name: lists.load(job.lists, name, ("id", "path")) for name in shown}
    todo = {
        name: ~np.isin(each.ids, np.concatenate([nothing, *travelled]))
        for name, each in ids.items()
    }
    voting = job.features / job.models[0] / reference
    images = budget.Images(
        len(ids[QUERY]),
        len(ids.get(INDEX, ())),
        len(store.load(voting)) if reference else 0,
        known=int((~todo[INDEX]).sum()) if INDEX in todo else 0,
    )
    if any(job.views.of(net.input).template for net in _nets(job).values()):
        told = "what an image costs is not measured with a template"
        whole = stepdown.Plan(job.models, job.views.scales, 0.0, True, told)
        return whole, UNKNOWN * max(0.0, entry.ends - time.time())
    after = _after(entry, job, images)
    left = entry.ends - time.time()
    paths = np.concatenate([ids[n].rows["path"].to_numpy(str)[todo[n]] for n in ids])
    if not len(paths):
        whole = stepdown.Plan(job.models, job.views.scales, 0.0, True, "all is known")
        return whole, after[-1]
    seconds = min(LOOK, SHARE * max(left, 0.0), EACH * len(paths))
    found = _look(entry, job, paths, seconds)
    taken = stepdown.plan(
        found.seconds,
        len(paths),
        left,
        rest=after,
        decode=1 / found.decode,
        overlap=entry.gpus > 0,
        # what travelled was looked at at these scales
        scales=[job.views.scales] if job.known else (),
    )
    number = len(taken.models)
    each = max(taken.seconds - after[number - 1], 0.0) / len(paths)
    # time is looked at between blocks, of each rank
    block = fill.BLOCK * max(1, entry.gpus) * each
    return taken, max(after[number - 1], BLOCKS * block)


def _look(
    entry: Entry, job: extract.Job, paths: np.ndarray, seconds: float
) -> rates.Rates:
    """What an image costs here, by some of them."""
    device = torch.device("cuda" if entry.gpus else "cpu")
    some = np.random.default_rng(0).permutation(len(paths))[:2000]
    loaded = {name: nets.load(job.runs / name, device).eval() for name in job.models}
    found = rates.measure(
        loaded,
        job.views,
        job.data,
        paths[np.sort(some)],
        device=device,
        gpus=max(1, entry.gpus),
        seconds=seconds,
        batch=job.batch if entry.gpus else min(FEW, job.batch),
        workers=job.workers * max(1, entry.gpus),  # of all ranks
    )
    if entry.gpus:  # the ranks need the memory
        loaded.clear()
        torch.cuda.empty_cache()
    return found


def _after(entry: Entry, job: extract.Job, images: budget.Images) -> list[float]:
    """Seconds that search, tags and rerank may take with 1, 2, ... models.

    By the table of machines; steps that verify, diffuse or build graphs are not counted.
    """
    known = budget.MACHINES["t4x2" if entry.gpus else "cpu4"]
    machine = replace(known, gpus=entry.gpus)
    models = [budget.count(name, net, job.views) for name, net in _nets(job).items()]
    after = []
    for number in range(1, len(models) + 1):
        steps = budget.estimate(images, models[:number], machine, batch=job.batch).steps
        hours = sum(step.hours for step in steps if step.name in AFTER)
        after.append(MARGIN * 3600 * hours)
    return after


def _nets(job: extract.Job) -> Mapping[str, nets.NetConfig]:
    about = {name: nets.describe(job.runs / name) for name in job.models}
    return {
        name: config.from_dict(nets.NetConfig, each["config"])
        for name, each in about.items()
    }
