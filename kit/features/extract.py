"""Images -> features: models over one list into stores, on one process or many, resumable.

`python -m kit.features.extract JOB.json`, alone or under torchrun; `run` does the work. Every
image is read and decoded once for all models.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kit import config, files, launch
from kit.data import lists, tars
from kit.data.images import packed
from kit.data.inputs import InputSpec
from kit.data.readers import open_reader
from kit.features import fill, store
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

    def __post_init__(self) -> None:
        config.check(self, least={"batch": 1, "workers": 0, "max_unreadable": 0})
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models {self.models} are none, or one stands twice")
        for name in self.models:
            if not tars.inside(name):
                raise ValueError(f"model {name!r} is not a path inside {self.runs}")

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
    if not about.exists() or nets.load(folder).config != net:
        nets.save(nets.build(net), folder, seen={})
    return folder


def run(job: Job) -> list[Path]:
    """Fills each model's store block by block, each rank its share; what is there is kept.

    Vectors are equal to the bit for any number of ranks and any other models in the job, but
    for models of other shapes: they make other batches, and those round otherwise.
    """
    with launch.group() as rank, ExitStack() as locks:
        # ranks finish further apart than a collective may usually take
        patient = dist.new_group(timeout=PATIENCE) if rank.world > 1 else None
        abouts = {name: nets.describe(job.runs / name) for name in job.models}
        listed = _prepare(job, abouts, rank, locks)
        _sum((0, 0), rank, patient)  # the stores are there
        models = [
            fill.Model(job.runs / name, _spec(about), job.views, job.store(name))
            for name, about in abouts.items()
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


def _prepare(
    job: Job, abouts: dict[str, dict], rank: launch.Rank, locks: ExitStack
) -> fill.Listed:
    """The list as every rank needs it; the main one creates the stores and keeps their locks."""
    specs = {name: _spec(about) for name, about in abouts.items()}
    shown = [job.views.of(spec) for spec in specs.values()]
    wanted = ["id", "path"]
    if any(spec.template for spec in shown):
        wanted += ["height", "width"]
    rows = lists.load(job.lists, job.images, wanted)
    first = ~rows.rows["id"].duplicated().to_numpy()
    listed = _listed(rows, first, shown)
    _refuse_wrong_root(job.data, listed.paths)
    if rank.main:
        for folder in sorted(map(job.store, job.models)):
            locks.enter_context(files.lock(folder))
        ids = rows.ids[first]
        for name, about in abouts.items():
            facts = {
                "model": {"name": name, "hash": about["hash"]},
                "list": {"name": rows.name, "hash": rows.hash},
                "seen": about["seen"],
            } | job.views.facts(specs[name])
            store.create(job.store(name), ids, about["dim"], fill.BLOCK, facts)
    return listed


def _spec(about: dict[str, Any]) -> InputSpec:
    return config.from_dict(nets.NetConfig, about["config"]).input


def _listed(
    images: lists.ImageList, first: np.ndarray, specs: Sequence[InputSpec]
) -> fill.Listed:
    paths = packed(images.rows["path"].to_numpy())[first]
    group, sizes = np.zeros(len(paths), np.int64), None
    by_template = {spec.template: spec for spec in specs if spec.template}
    if by_template:
        sizes = images.rows[["height", "width"]].to_numpy(np.int32)[first]
        if (sizes <= 0).all():
            raise ValueError(
                f"list {images.name} has no heights and widths, from which template "
                f"{next(iter(by_template))} takes its shapes; run 00_image_lists with sizes"
            )
        for spec in by_template.values():
            own = np.unique(spec.group(*sizes.T), return_inverse=True)[1]
            group = group * (own.max() + 1) + own
    return fill.Listed(images.name, paths, sizes, group)


def _refuse_wrong_root(data: Path, paths: np.ndarray) -> None:
    reader = open_reader(data)
    if not any(reader.exists(path.decode()) for path in paths[:100]):
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


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    (path,) = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(config.read(Job, Path(path)))


if __name__ == "__main__":
    main()
