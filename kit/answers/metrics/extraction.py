"""Networks in any folders -> features of lists for an evaluation; what is there is kept."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kit.features import extract
from kit.features.views import Views
from kit.launch import launch
from kit.models import net as nets
from kit.rerank.chain import Chain


@dataclass(frozen=True)
class Networks:
    """Which networks look, and with which machine."""

    runs: Path  # folder of them all
    names: tuple[str, ...]  # paths in it
    views: Views = field(default_factory=Views)
    gpus: int = 1  # processes, one a GPU
    workers: int = 2  # loader processes of each
    batch: int = 32  # images at a time

    def chain(self, given: Chain | None = None) -> Chain:
        """`given`, refused unless these are its networks; else search alone, all weighing the same."""
        if given is None:
            return Chain(dict.fromkeys(self.names, 1.0))
        for name in given.models:
            if name not in self.names:
                there = ", ".join(self.names)
                raise ValueError(
                    f"the chain wants network {name}; given are {there}, under {self.runs}"
                )
        return given


def networks(folders: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds them all, and the name of each in it; refuses what is no network."""
    if not folders:
        raise ValueError("name at least one network's folder")
    whole = [folder.resolve() for folder in folders]
    for folder in whole:
        nets.describe(folder)
    runs = Path(os.path.commonpath([folder.parent for folder in whole]))
    return runs, tuple(folder.relative_to(runs).as_posix() for folder in whole)


def extracted(
    networks: Networks, lists: Path, images: str, data: Path, features: Path
) -> None:
    """Features of the list `images` by every network, in <features>/<network>/<list>."""
    job = extract.Job(
        runs=networks.runs,
        models=networks.names,
        lists=lists.resolve(),
        images=images,
        data=data.resolve(),
        features=features.resolve(),
        views=networks.views,
        batch=networks.batch,
        workers=networks.workers,
    )
    launch(
        "kit.features.extract",
        [str(job.write())],
        processes=networks.gpus,
        logs=job.folder / "logs",
    )
