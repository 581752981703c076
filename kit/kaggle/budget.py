"""Images, models and a machine -> hours, memory, disk and upload by step, and what does not fit.

`python -m kit.kaggle.budget --recipe R --machine t4x2` prints the table; `--measure DIR` replaces
its rates by those of this machine's loader and networks.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kit import config as configs
from kit.data.inputs import View
from kit.features.search import GPU_SCORES, QUERIES
from kit.features.views import Views
from kit.kaggle.rates import Rates, measure
from kit.models import backbones
from kit.models.net import EmbeddingNet, NetConfig
from kit.training import recipes

# --- what is known ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a machine sustains, not its peaks."""

    gpus: int  # 0: networks and search run on the cores
    network: float  # TFLOP/s of one GPU, or of all cores, in networks
    product: float  # TFLOP/s of one GPU, or of all cores, in the search
    gpu_memory: float  # GB of one GPU
    cores: int
    decode: float  # images/s a core: read, decoded, resized to one view
    ram: float  # GB
    disk: float  # GB that may be written
    hours: float  # of a session
    cold: float  # GB/s of mapped rows from where they are mounted
    warm: float  # GB/s of mapped rows that are in memory, to where they are multiplied
    source: str  # of the rates
    warning: str = ""

    def __post_init__(self) -> None:
        configs.check(self, least={"gpus": 0, "gpu_memory": 0, "cores": 1})
        for name in ("network", "product", "decode", "ram", "hours", "cold", "warm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")


_LOADER = (
    "decode assumed, half of what a Xeon core was measured to do (200/s, photos of 146 KB at "
    "512 px); mapped rows assumed"
)
_T4X2 = Machine(
    gpus=2,
    network=9.5,
    product=25.0,
    gpu_memory=15.8,
    cores=4,
    decode=100.0,
    ram=30.0,
    disk=20.0,
    hours=12.0,
    cold=0.2,
    warm=3.0,
    source="networks: NVIDIA's published ResNet-50 v1.5 inference, PyTorch in mixed precision, "
    f"batch 64, 1,165 images/s of 8.2 GFLOP; search assumed, 40 % of the peak; {_LOADER}",
)
_P100 = replace(
    _T4X2,
    gpus=1,
    network=8.0,
    product=8.0,
    gpu_memory=17.1,
    source="networks and search assumed, 43 % of the half-precision peak (a T4's share in "
    f"single precision); {_LOADER}",
    warning="the torch of Kaggle's image has no kernels for a P100: it counts as no GPU",
)
_CPU4 = replace(
    _T4X2,
    gpus=0,
    network=0.06,
    product=0.1,
    gpu_memory=0.0,
    source=f"networks and search assumed; {_LOADER}",
)
_CPU2 = replace(
    _CPU4,
    network=0.03,
    product=0.5,
    cores=2,
    decode=200.0,
    ram=24.0,
    disk=100.0,
    cold=1.2,
    warm=2.2,
    source="2 cores of a Xeon with AMX, measured while others used them too; disk space and "
    "hours assumed",
)
_H100 = replace(
    _T4X2,
    gpus=1,
    network=120.0,
    product=300.0,
    gpu_memory=80.0,
    cores=16,
    ram=120.0,
    disk=100.0,
    cold=1.0,
    warm=10.0,
    source="all assumed; networks: twice an A100 in NVIDIA's published ResNet-50 training",
)
MACHINES = {
    "t4x2": _T4X2,
    "p100": _P100,
    "cpu4": _CPU4,
    "cpu2": _CPU2,
    "h100x1": _H100,
}

# assumed, GB: a process with CUDA, its context on the GPU, a loader's worker
PROCESS, CONTEXT, WORKER = 2.5, 0.6, 0.4
SEARCH = 0.6  # GB, as kit.features.search promises
# seconds a megapixel of all views but the smallest, on a core; measured
FURTHER = 0.010
# a search with bonuses against one without, 400k rows on a CPU; measured
BONUSES = 3.1
LINE = 5e-5  # seconds to write and check a query's line; measured
QUOTA = 100.0  # GB of private datasets, as users report it
ID = 64  # bytes, U16


@dataclass(frozen=True)
class Images:
    """How many there are; the defaults are those of 2021's hidden rerun, at most."""

    queries: int = 117_577
    index: int = 761_757
    references: int = 4_825_830  # their features travelled
    known: int = 0  # index images whose features travelled, too

    def __post_init__(self) -> None:
        configs.check(self, least=dict.fromkeys(vars(self), 0))
        if self.known > self.index:
            raise ValueError(f"{self.known} of {self.index} index images are known")

    @property
    def fresh(self) -> int:
        """Images to decode and extract."""
        return self.queries + self.index - self.known


@dataclass(frozen=True)
class Model:
    """What one image costs a model."""

    name: str
    gflop: tuple[float, ...]  # of each scale; a multiply-add is two
    views: tuple[View, ...]  # of each scale
    dim: int
    parameters: int
    activation: float  # GB in half precision: input and output of the largest layer

    @property
    def weights(self) -> float:
        """GB in single precision."""
        return 4e-9 * self.parameters


def count(name: str, config: NetConfig, how: Views) -> Model:
    """A network counted without weights or pixels, one square image at each scale."""
    with torch.device("meta"):
        net = EmbeddingNet(config).eval()
    views, gflop, largest = how.each(config.input), [], 0

    def look(_: nn.Module, given: tuple, made: object) -> None:
        nonlocal largest
        held = [x.numel() for x in (*given, made) if isinstance(x, Tensor)]
        largest = max(largest, sum(held))

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    for view in views:
        x = torch.empty(1, 3, *view.shape(-1, -1), device="meta")
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            # not by its forward: autocast does not know the device without memory
            net.neck(net.pool(backbones.maps(net.backbone, x, net.stages)))
        gflop.append(counter.get_total_flops() / 1e9 * (1 + how.flip))
    parameters = sum(p.numel() for p in net.parameters())
    sizes = (tuple(gflop), tuple(views), net.dim, parameters)
    return Model(name, *sizes, activation=2e-9 * largest)


# --- the table ----------------------------------------------------------------------------------


class Step(NamedTuple):
    name: str
    hours: float
    ram: float = 0.0  # GB of anonymous memory; mapped files come and go
    gpu: float = 0.0  # GB on each
    disk: float = 0.0  # GB written
    upload: float = 0.0  # GB sent before


class Budget(NamedTuple):
    steps: tuple[Step, ...]
    total: Step  # hours: decoding runs beside extraction where there is a GPU
    problems: tuple[str, ...]  # what does not fit, in words


@dataclass(frozen=True)
class _Case:
    """What a budget is made for."""

    images: Images
    models: Sequence[Model]
    machine: Machine
    rates: Rates | None
    batch: int

    @property
    def ranks(self) -> int:
        return max(1, self.machine.gpus)

    @property
    def dims(self) -> int:
        return sum(model.dim for model in self.models)

    @property
    def free(self) -> float:
        """GB in which mapped rows can stay."""
        return self.machine.ram - PROCESS - SEARCH


def estimate(
    images: Images,
    models: Sequence[Model],
    machine: Machine,
    rates: Rates | None = None,
    batch: int = 32,
) -> Budget:
    """Every step of a submission; `rates` replaces the machine's for decoding and networks."""
    if not models:
        raise ValueError("no model: name at least one")
    case = _Case(images, models, machine, rates, batch)
    decode = _decode(case)
    extract = [_extract(case, model) for model in models]
    plain = _products(case, [images.queries], images.index)
    asking = [images.queries, images.index]
    tagged = _products(case, asking, images.references)
    rows = sum(_row(model) for model in models)
    after = [
        _searching(case, "search", plain),
        _searching(case, "tag", tagged, upload=1e-9 * images.references * rows),
        _searching(case, "rerank", BONUSES * plain),
        Step("write", images.queries * LINE / 3600, disk=1e-9 * 1717 * images.queries),
    ]
    steps = (decode, *extract, *after)
    looking = decode.hours, sum(step.hours for step in extract)
    # the weights of all models stay, scratch is one model's at a time
    scratch = max(_scratch(case, model) for model in models)
    on_gpu = CONTEXT + scratch + sum(1.5 * model.weights for model in models)
    total = Step(
        "total",
        (max if machine.gpus else sum)(looking) + sum(step.hours for step in after),
        max(decode.ram + sum(step.ram for step in extract), *(s.ram for s in after)),
        max(on_gpu, *(s.gpu for s in after)) if machine.gpus else 0.0,
        sum(step.disk for step in steps),
        sum(step.upload for step in steps),
    )
    return Budget(steps, total, tuple(_problems(case, steps, total)))


def _decode(case: _Case) -> Step:
    """Each image once, resized to every view that some model looks at."""
    views = {view for model in case.models for view in model.views}
    pixels = [math.prod(view.shape(-1, -1)) / 1e6 for view in views]
    machine, further = case.machine, sum(pixels) - min(pixels)
    speed = machine.cores / (1 / machine.decode + FURTHER * further)
    if case.rates:
        speed = case.rates.decode
    # each worker has two batches of uint8 on their way
    loading = machine.cores * (WORKER + 2 * case.batch * 3e-3 * sum(pixels))
    hours = case.images.fresh / speed / 3600
    return Step("decode", hours, ram=case.ranks * PROCESS + loading)


def _extract(case: _Case, model: Model) -> Step:
    seconds = sum(model.gflop) / 1e3 / (case.machine.network * case.ranks)
    if case.rates:
        seconds = sum(case.rates.seconds[model.name].values())
    scratch = _scratch(case, model)
    # autocast keeps copies of the weights in half precision
    ram, gpu = model.weights * case.ranks, 1.5 * model.weights + scratch
    if not case.machine.gpus:  # no half precision there
        ram, gpu = ram + 2 * scratch, 0.0
    return Step(
        f"extract {model.name}",
        case.images.fresh * seconds / 3600,
        ram,
        gpu,
        disk=1e-9 * case.images.fresh * _row(model),
        upload=model.weights + 1e-9 * case.images.known * _row(model),
    )


def _row(model: Model) -> int:
    """Bytes of an image's features and id."""
    return 2 * model.dim + ID


def _scratch(case: _Case, model: Model) -> float:
    """GB: what a batch's largest layer holds, and as much for the shortcut and the workspace."""
    return 2 * case.batch * model.activation


def _searching(case: _Case, name: str, hours: float, upload: float = 0.0) -> Step:
    # 100 scores and rows of each query, three of each index image
    kept = 1e-9 * 12 * (100 * case.images.queries + 3 * case.images.index)
    gpu = CONTEXT + 6e-9 * GPU_SCORES if case.machine.gpus else 0.0
    return Step(name, hours, PROCESS + SEARCH + kept, gpu, upload=upload)


def _products(case: _Case, asking: Sequence[int], rows: int) -> float:
    """Hours: what takes longer of multiplying, and of reading all rows for each turn of queries."""
    machine = case.machine
    flop = 2.0 * sum(asking) * rows * case.dims
    multiplying = flop / 1e12 / (machine.product * case.ranks)
    turns, size = sum(-(-n // QUERIES) for n in asking), 2e-9 * rows * case.dims
    again = machine.warm if size <= case.free else machine.cold
    reading = size / machine.cold + size / again * (turns - 1) if turns else 0.0
    return max(multiplying, reading) / 3600


def _problems(case: _Case, steps: Sequence[Step], total: Step) -> Iterator[str]:
    machine = case.machine
    if machine.warning:
        yield machine.warning
    if total.hours > machine.hours:
        longest = max(steps, key=lambda step: step.hours)
        yield (
            f"{total.hours:.1f} hours do not fit in a session of {machine.hours:g}; the "
            f"longest step, {longest.name}, takes {longest.hours:.1f}: fewer scales or "
            "models, or index features that travel"
        )
    for what, asked, there, way in (
        ("GB of RAM", total.ram, machine.ram, "smaller batches"),
        ("GB on a GPU", total.gpu, machine.gpu_memory, "smaller batches, fewer models"),
        ("GB of files", total.disk, machine.disk, "fewer models"),
        ("GB of upload", total.upload, QUOTA, "fewer references or models"),
    ):
        if asked > there:
            yield f"{asked:.1f} {what} do not fit in {there:g}: {way}"
    mapped = 2e-9 * case.images.references * case.dims
    if mapped > case.free:
        yield (
            f"{mapped:.1f} GB of mapped references do not stay in {case.free:.1f} GB of free "
            "memory: each turn of queries reads them from where they are mounted"
        )


def table(budget: Budget, machine: Machine, rates: Rates | None = None) -> str:
    """The budget as text, the origin of its rates, and what does not fit."""
    width = max(len(step.name) for step in budget.steps)
    lines = [f"{'step':{width}}  {'hours':>8}  RAM GB  GPU GB  disk GB  upload GB"]
    for name, hours, *sizes in (*budget.steps, budget.total):
        ram, gpu, disk, upload = sizes
        lines.append(
            f"{name:{width}}  {hours:8.2f}  {ram:6.1f}  {gpu:6.1f}  {disk:7.1f}  "
            f"{upload:9.1f}"
        )
    beside = "beside" if machine.gpus else "before"
    lines += ["", f"Decoding runs {beside} extraction. Rates: {machine.source}."]
    if rates:
        lines.append("Decoding and networks: measured here instead.")
    return "\n".join(lines + [f"! {said}" for said in budget.problems])


# --- command ------------------------------------------------------------------------------------


def networks(names: Sequence[str], size: int = 0) -> dict[str, NetConfig]:
    """The network that each recipe ends with, and the input it is to be shown."""
    found = {}
    for name in names:
        recipe = recipes.get(name)
        last = recipe.stages[-1]
        side = size or last.eval_size or last.size
        found[name] = replace(recipe.net, input=replace(recipe.net.input, size=side))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    images = Images(options.queries, options.index, options.references, options.known)
    machine = MACHINES[options.machine]
    if options.hours:
        machine = replace(machine, hours=options.hours)
    how = Views(scales=tuple(options.scales))
    asked = networks(options.recipe, options.size)
    models = [count(name, config, how) for name, config in asked.items()]
    rates = None
    if options.measure:
        rates = _measured(asked, how, options)
    print(f"{options.machine}: {images.fresh:,} images to extract\n")
    print(
        table(estimate(images, models, machine, rates, options.batch), machine, rates)
    )


def _measured(
    asked: Mapping[str, NetConfig], how: Views, options: argparse.Namespace
) -> Rates:
    """Of random weights, on photos of a folder."""
    found = sorted(options.measure.rglob("*.jpg"))[:2000]
    if not found:
        raise FileNotFoundError(f"no .jpg in {options.measure}")
    paths = np.array([path.relative_to(options.measure).as_posix() for path in found])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    form = torch.channels_last
    nets = {
        name: EmbeddingNet(config).to(device, memory_format=form).eval()
        for name, config in asked.items()
    }
    return measure(
        nets,
        how,
        options.measure,
        paths,
        device=device,
        gpus=max(1, torch.cuda.device_count()),
        seconds=options.seconds,
        batch=options.batch,
        workers=options.workers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", nargs="+", required=True, help="one a model")
    parser.add_argument("--machine", choices=MACHINES, default="t4x2")
    for name, value in vars(Images()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value:,})")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--size", type=int, default=0, help="0: as the recipe ends")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hours", type=float, default=0.0, help="0: the machine's")
    parser.add_argument("--measure", type=Path, help="folder of photos, here and now")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring")
    parser.add_argument("--workers", type=int, default=2, help="of the loader")
    return parser


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))
