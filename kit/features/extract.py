"""Images -> features: models over one list into stores, on one process or many, resumable.

`python -m kit.features.extract JOB.json`, alone or under torchrun; `run` does the work. Every
image is read and decoded once for all models, and not at all where features of it are known.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from kit import checksums, config, files, launch
from kit.data import lists, tars
from kit.data.images import packed
from kit.data.inputs import InputSpec
from kit.data.readers import open_reader
from kit.features import fill, store
from kit.features.known import Known, load_known
from kit.features.views import Views
from kit.models import net as nets

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=7)  # of ranks that have finished, for those that have not


@dataclass(frozen=True)
class Job:
    """Which models look at which list, and where the features go."""

    runs: Path  # folder of the models
    models: tuple[str, ...]  # paths in it, with model.safetensors and model.json
    lists: Path
    images: str  # name of the list; an image that stands there twice is extracted once
    data: Path  # files, tars or shards that the list's paths start from
    features: Path  # the stores are <model>/<list> in it
    views: Views = field(default_factory=Views)
    batch: int = 32  # images; three scales of L2 are 0.2 GB, twice in each worker
    workers: int = 2  # loader processes of each rank
    max_unreadable: float = 0.2  # share of the list; more looks like a lost disk
    # lists whose stores, in <model>/<known>, already have some of the images
    known: tuple[str, ...] = ()
    # folders like `features` whose stores, of the same weights and views, may have some, too
    others: tuple[str, ...] = ()
    # ids that stores of `known` and `others` have for the list's images; empty: the list's own
    known_as: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        config.check(self, least={"batch": 1, "workers": 0, "max_unreadable": 0})
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models {self.models} are none, or one stands twice")
        for name in self.models:
            if not tars.inside(name):
                raise ValueError(f"model {name!r} is not a path inside {self.runs}")
        for name in self.known:
            if name == self.images or not tars.inside(name):
                raise ValueError(
                    f"known list {name!r} is not another one than {self.images}"
                )

    def store(self, model: str) -> Path:
        return self.features / model / self.images

    @property
    def folder(self) -> Path:
        """The first model's store: the job's own file and logs lie there."""
        return self.store(self.models[0])

    def write(self) -> Path:
        return config.write(self, self.folder / "job.json")


def untrained(net: nets.NetConfig, folder: Path) -> Path:
    """Saves the pretrained backbone, pooled and without a neck: where a recipe starts."""
    net = replace(net, neck="none")
    about = folder / "model.json"
    try:
        whole = about.exists() and nets.load(folder).config == net
    except checksums.Damaged as error:
        log.warning("%s", error)
        whole = False
    if not whole:
        nets.save(nets.build(net), folder, seen={})
    return folder


def run(job: Job) -> list[Path]:
    """Fills each model's store block by block, each rank its share; what is there is kept.

    Vectors are equal to the bit for any number of ranks and any other models in the job, but
    for models of other shapes: they make other batches, and those round otherwise. So do images
    that are known; their vectors are copies.
    """
    with launch.group() as rank, ExitStack() as locks:
        # ranks finish further apart than a collective may usually take
        patient = dist.new_group(timeout=PATIENCE) if rank.world > 1 else None
        listed, targets = _prepare(job, rank, locks)
        _sum((0, 0), rank, patient)  # the stores are there
        models = [
            fill.Model(job.runs / name, to.spec, job.views, to.known, job.store(name))
            for name, to in targets.items()
        ]
        share = fill.fill(job.data, listed, models, rank, job.batch, job.workers)
        written, total = _sum(share, rank, patient)
        if written < total:
            raise launch.Stopped(
                f"{job.images}: stopped after {written} of {total} images, the time is over; "
                "run it again to go on"
            )
        if rank.main:
            _finish(job)
    return [job.store(name) for name in job.models]


def _sum(counts: tuple[int, int], rank: launch.Rank, patient: Any) -> tuple[int, int]:
    """Of all ranks, which wait for each other here."""
    if rank.world == 1:
        return counts
    total = torch.tensor(counts, device=rank.device)
    dist.all_reduce(total, group=patient)
    return tuple(total.tolist())


class _Target(NamedTuple):
    """What a model's store is to hold."""

    spec: InputSpec
    dim: int
    facts: dict[str, Any]  # of its manifest
    known: Known


def _prepare(
    job: Job, rank: launch.Rank, locks: ExitStack
) -> tuple[fill.Listed, dict[str, _Target]]:
    """What every rank needs; the main one creates the stores and keeps their locks."""
    abouts = {name: nets.describe(job.runs / name) for name in job.models}
    shown = [job.views.of(_spec(about)) for about in abouts.values()]
    wanted = ["id", "path"]
    if any(spec.template for spec in shown):
        wanted += ["height", "width"]
    rows = lists.load(job.lists, job.images, wanted)
    first = ~rows.rows["id"].duplicated().to_numpy()
    ids = rows.ids[first]
    of = {"name": rows.name, "hash": rows.hash}
    targets = {name: _target(job, name, abouts[name], of, ids) for name in abouts}
    known = np.logical_and.reduce([to.known.there for to in targets.values()])
    listed = _listed(rows, first, known, shown)
    _refuse_wrong_root(job.data, listed.paths[np.flatnonzero(~known)[:100]])
    if rank.main:
        if known.any():
            counts = int(known.sum()), len(known)
            log.info("%s: %d of %d images are known already", job.images, *counts)
        for folder in sorted(map(job.store, job.models)):
            locks.enter_context(files.lock(folder))
        for name, to in targets.items():
            store.create(job.store(name), ids, to.dim, fill.BLOCK, to.facts)
    return listed, targets


def _target(
    job: Job, name: str, about: dict[str, Any], of: dict[str, str], ids: np.ndarray
) -> _Target:
    """of: name and hash of the list, whose images are `ids`."""
    spec = _spec(about)
    views = job.views.facts(spec)
    model = {"name": name, "hash": about["hash"]}
    stores = [job.features / name / other for other in job.known]
    found = [load_known(path, about["hash"], views) for path in stores]
    found += _others(job, name, about["hash"], views)
    called = np.array(job.known_as, "U16") if job.known_as else ids
    if len(called) != len(ids):
        raise ValueError(f"known_as has {len(called)} ids for {len(ids)} images")
    there = Known(found, called)
    facts = {"model": model, "list": of, "seen": about["seen"]} | views
    return _Target(spec, about["dim"], facts, there)


def _others(
    job: Job, name: str, model_hash: str, views: dict[str, Any]
) -> list[store.Features]:
    """The complete stores of a model in `job.others`; those of other weights or views are not."""
    found = []
    for folder in job.others:
        for manifest in sorted((Path(folder) / name).glob("*/manifest.json")):
            if manifest.parent == job.store(name):
                continue
            try:
                found.append(load_known(manifest.parent, model_hash, views))
            except (ValueError, OSError):
                continue
    return found


def _spec(about: dict[str, Any]) -> InputSpec:
    return config.from_dict(nets.NetConfig, about["config"]).input


def _listed(
    images: lists.ImageList,
    first: np.ndarray,
    known: np.ndarray,
    specs: Sequence[InputSpec],
) -> fill.Listed:
    """known: (N,) bool, of the N images that `first` leaves."""
    paths = packed(images.rows["path"].to_numpy())[first]
    group, sizes = np.zeros(len(paths), np.int64), None
    by_template = {spec.template: spec for spec in specs if spec.template}
    if by_template:
        sizes = images.rows[["height", "width"]].to_numpy(np.int32)[first]
        if not known.all() and (sizes[~known] <= 0).all():
            raise ValueError(
                f"list {images.name} has no heights and widths, from which template "
                f"{next(iter(by_template))} takes its shapes; run 00_image_lists with sizes"
            )
        for spec in by_template.values():
            own = np.unique(spec.group(*sizes.T), return_inverse=True)[1]
            group = group * (own.max() + 1) + own
    return fill.Listed(images.name, paths, sizes, np.where(known, fill.KNOWN, group))


def _refuse_wrong_root(data: Path, paths: np.ndarray) -> None:
    """paths: some that are to be looked at."""
    if len(paths) and not any(map(open_reader(data).exists, map(bytes.decode, paths))):
        raise FileNotFoundError(
            f"{data}: {paths[0].decode()} is not there, nor are the list's next images; "
            "is this the folder that the list's paths start from?"
        )


def _finish(job: Job) -> None:
    """Marks every store complete that can be; then raises what the first other one said."""
    refused = None
    for name in job.models:
        try:
            missing = store.finish(job.store(name), job.max_unreadable)
        except ValueError as error:
            refused = refused or error
            continue
        if missing:
            log.info("%s, %s: %d images cannot be read", name, job.images, missing)
    if refused:
        raise refused


def settle(job: Job) -> int:
    """When the time is over: marks the stores complete with what is there, and what is known.

    Returns how many images were not looked at; they count as unreadable until `run` goes on.
    Refuses a store without any features.
    """
    with ExitStack() as locks:
        alone = launch.Rank(0, 1, 0, torch.device("cpu"))
        listed, targets = _prepare(job, alone, locks)
        lacking = np.zeros(len(listed.paths), bool)
        for name, to in targets.items():
            writer = store.Writer(job.store(name))
            for block in np.flatnonzero(writer.done == 0):
                rows = np.arange(len(lacking))[block * fill.BLOCK :][: fill.BLOCK]
                vectors = np.zeros((len(rows), to.dim), np.float16)
                to.known.copy(rows[0], vectors)
                writer.write(block, vectors, mark=False)
                lacking[rows] |= ~to.known.there[rows]
            store.finish(job.store(name), lacking=True)
    return int(lacking.sum())


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    job = config.read_argument(Job, arguments, __doc__.partition("\n")[0])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(job)


if __name__ == "__main__":
    main()
