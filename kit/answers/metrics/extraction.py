"""Networks in any folders -> features of lists for an evaluation; what is there is kept."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kit import config
from kit.answers.metrics import protocol
from kit.features import extract
from kit.features.views import Views
from kit.launch import launch
from kit.models import net as nets
from kit.models.backbones import input_spec
from kit.models.weights import PACKAGED
from kit.rerank.chain import Chain
from kit.training import recipes

log = logging.getLogger(__name__)

# networks that no stage has trained: untrained:RECIPE starts as the recipe does; timm:BACKBONE
# has random weights, timm:BACKBONE=FILE those of a file; packaged:efficientnet-lite0 to lite2
# those of an installed package. All are pooled by GeM, without a neck.
UNTRAINED = ("untrained", "timm", "packaged")
WEIGHTS = Path(__file__).resolve().parents[3] / "weights"  # files that recipes name


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


def networks(
    models: Sequence[Path | str], work: Path | None = None
) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds them all, and the name of each in it; refuses what is no network.

    models: folders of trained stages, or of UNTRAINED, which are made in <work>/networks.
    """
    if not models:
        raise ValueError("name at least one network's folder")
    whole = [_folder(str(model), work).resolve() for model in models]
    for folder in whole:
        nets.describe(folder)
    runs = Path(os.path.commonpath([folder.parent for folder in whole]))
    return runs, tuple(folder.relative_to(runs).as_posix() for folder in whole)


def views_of(networks: Networks) -> list[str]:
    """How each network looks at an image, in a line of text."""
    found = []
    for name in networks.names:
        about = nets.describe(networks.runs / name)["config"]
        spec = config.from_dict(nets.NetConfig, about).input
        found.append(f"{name} looks at {protocol.views(networks.views.facts(spec))}")
    return found


def _folder(model: str, work: Path | None) -> Path:
    """A network's folder; one of UNTRAINED is made first, the same at every call."""
    kind, _, name = model.partition(":")
    if kind not in UNTRAINED or work is None:
        return Path(model)
    if kind == "untrained":
        net = recipes.get(name).network("recipe", WEIGHTS)
    else:
        backbone, _, file = name.partition("=")
        pretrained = str(Path(file).resolve()) if file else ""
        if kind == "packaged":
            pretrained = backbone.removeprefix("efficientnet-")
            if pretrained not in PACKAGED or file:
                known = ", ".join(f"packaged:efficientnet-{each}" for each in PACKAGED)
                raise ValueError(f"model {model!r} is not one of {known}")
            backbone = f"tf_efficientnet_{pretrained}"
        net = nets.NetConfig(backbone, pretrained, input=input_spec(backbone))
    if not net.pretrained:
        log.warning("%s: random weights; %s=FILE loads a file's", model, model)
    folder = work / "networks" / re.sub("[^0-9A-Za-z_.-]+", "-", model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return extract.untrained(net, folder)


def extracted(
    networks: Networks,
    lists: Path,
    images: str,
    data: Path,
    features: Path,
    others: Sequence[Path] = (),  # folders of features that may have some of the images
    known_as: Sequence[str] = (),  # the ids that they have there
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
        others=tuple(str(folder.resolve()) for folder in others),
        known_as=tuple(known_as),
    )
    launch(
        "kit.features.extract",
        [str(job.write())],
        processes=networks.gpus,
        logs=job.folder / "logs",
    )
