"""One training stage and where it runs, as data; kit.training.stage runs it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit import config
from kit.data import templates
from kit.data.augment import Augment
from kit.data.inputs import InputSpec
from kit.data.samplers import Sampling
from kit.losses.heads import Head
from kit.models.net import NetConfig
from kit.training.optim import Optim

# fields of Job that fit a stage to a machine; the lists, folders and loaders are others
MACHINE = ("accumulate", "checkpointing", "compile", "channels_last", "gpu_decode")


@dataclass(frozen=True)
class Stage:
    """Everything that decides the weights one training stage produces."""

    name: str
    images: str  # image list: clean, c2x, ...; rows without a label are left out
    size: int  # side of the square input while training, pixels
    epochs: int  # of the schedule
    batch: int  # images a step, over all processes
    start: int = 0  # epochs of the schedule that lie behind it: a tail of one (2019)
    stop: int = 0  # the last epoch that is trained; 0: to the schedule's end
    template: str = (
        ""  # aspect templates while training (2019), their square being `size`
    )
    eval_size: int = 0  # at extraction, 0: as trained; crops enlarge (FixRes, 2019)
    init: str = ""  # the earlier stage; "": the network's pretrained weights
    keep_head: bool = True  # its classifier's rows too; False: new ones (2019)
    freeze: int = 0  # first epochs in which the backbone stands still
    frozen_norms: bool = False  # batch norms as they come (2019, last epoch)
    sync_norms: bool = False  # batch statistics over all processes
    lora: int = (
        0  # rank of the adapters that learn in a ViT's place; 0: all of it learns
    )
    ema: float = 0.0  # decay of an average of the weights, which is what is saved
    seed: int = 0
    max_unreadable: float = 0.02  # share of the list; more stops the stage
    optim: Optim = field(default_factory=Optim)
    head: Head = field(default_factory=Head)
    sampling: Sampling = field(default_factory=Sampling)
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        config.check(
            self,
            f"stage {self.name}",
            least=dict.fromkeys(("size", "epochs", "batch"), 1)
            | dict.fromkeys(("start", "stop", "eval_size", "freeze", "lora"), 0)
            | dict.fromkeys(("ema", "seed", "max_unreadable"), 0),
            most=dict.fromkeys(("size", "eval_size"), 16_384)
            | {"epochs": 100_000, "stop": self.epochs, "freeze": self.epochs}
            | {"batch": 1 << 24, "lora": 4_096, "seed": (1 << 31) - 1}
            | {"max_unreadable": 1},
            below={"ema": 1},
        )
        if not self.start < self.last:
            raise ValueError(
                f"stage {self.name}: start is {self.start}, not before its last epoch {self.last}"
            )

        if self.template in templates.FREE:
            raise ValueError(
                f"stage {self.name}: template {self.template} is for extraction; images of "
                "one shape are too few to train on"
            )
        if self.freeze and (self.frozen_norms or self.lora):
            raise ValueError(
                f"stage {self.name}: freeze is for networks that then learn whole; set "
                "freeze=0, or neither frozen_norms nor lora"
            )

    @property
    def last(self) -> int:
        """The epoch at which it ends."""
        return self.stop or self.epochs


@dataclass(frozen=True)
class Job:
    """A stage and where it runs: what a process needs to do its part.

    The fields after `runs` do not decide the weights, but for rounding (of pixels too, where the
    device decodes).
    """

    stage: Stage
    net: NetConfig
    lists: Path  # folder of the image lists
    data: Path  # folder that the lists' paths start from
    runs: Path  # folder of this recipe's stages
    workers: int = 2  # loader processes of each rank
    save_every: int = 200  # steps between two resume states
    log_every: int = 10
    accumulate: int = 1  # parts that a rank's share of a batch is computed in
    checkpointing: bool = False  # recompute activations: less memory, a third more time
    compile: bool = False  # torch.compile
    channels_last: bool = True
    gpu_decode: bool = False  # JPEGs on the device; pixels differ by a level or two

    def __post_init__(self) -> None:
        least = dict.fromkeys(("save_every", "log_every", "accumulate"), 1)
        config.check(self, least=least | {"workers": 0})

    def check_parts(self, world: int) -> None:
        """Raise ValueError unless `world` processes can compute a batch in equal parts.

        A part of a single image has no variance, which the neck's batch norm divides by.
        """
        stage, images = self.stage, self.stage.batch // world
        split = f"stage {stage.name}: of a batch of {stage.batch}, {images} images a process"
        if images % self.accumulate:
            raise ValueError(f"{split} do not split into {self.accumulate} parts")
        still = stage.frozen_norms or (stage.sync_norms and world > 1)
        if self.net.neck == "bn" and not still and images < 2 * self.accumulate:
            raise ValueError(
                f"{split} in {self.accumulate} parts are {images // self.accumulate} a part; "
                f"the batch norm needs 2: set batch to {2 * world * self.accumulate} or more"
                + (", or accumulate less" if self.accumulate > 1 else "")
            )

    @property
    def folder(self) -> Path:
        return self.runs / self.stage.name

    @property
    def shown(self) -> InputSpec:
        """What the network is fed while it learns."""
        stage = self.stage
        return dataclasses.replace(
            self.net.input, size=stage.size, template=stage.template
        )

    @property
    def kept(self) -> NetConfig:
        """The network as it is saved: with the input that extraction is to use."""
        side = self.stage.eval_size or self.stage.size
        return dataclasses.replace(
            self.net, input=dataclasses.replace(self.net.input, size=side)
        )

    def write(self) -> Path:
        return config.write(self, self.folder / "job.json")


def change(stage: Stage, **fields: Any) -> Stage:
    """`stage` with some fields changed, those of its parts by their own names."""
    if "name" in fields:
        raise ValueError(f"stage {stage.name} keeps its name")
    try:
        return config.change(stage, **fields)
    except ValueError as error:
        said = str(error)
        known = said.startswith(f"stage {stage.name}")
        raise ValueError(said if known else f"stage {stage.name}: {said}") from None
