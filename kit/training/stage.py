"""One training stage: image list -> checkpoint, on one process or many, resumable at any step.

`python -m kit.training.stage JOB.json`, alone or under torchrun; `run` does the work.
"""

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from kit import files, launch
from kit.data import lists
from kit.data.augment import Augment
from kit.data.images import TrainImages, in_worker
from kit.data.samplers import Batches
from kit.losses.heads import ArcFace
from kit.models import net as nets
from kit.training import checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Everything that decides the weights one training stage produces."""

    name: str
    images: str  # image list: clean, c2x, ...; rows without a label are left out
    size: int  # side of the square input while training, pixels
    epochs: int
    batch: int  # images a step, over all processes
    lr: float  # peak of the cosine
    eval_size: int = 0  # at extraction, 0: as trained; crops enlarge (FixRes, 2019)
    init: str = ""  # the earlier stage; "": the network's pretrained weights
    warmup: float = 0.0  # epochs
    optimizer: str = "sgd"  # with momentum 0.9, or "adamw"
    weight_decay: float = 5e-4  # none on norms and biases
    head_lr: float = 1.0  # the classifier's learning rate, as a multiple
    margin: float = 0.3  # ArcFace, radians
    scale: float = 30.0
    clip: float = 0.0  # largest norm of the gradient; 0: unlimited
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    max_unreadable: float = 0.02  # share of the list; more stops the stage

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            value, least = getattr(self, field_.name), LEAST.get(field_.name)
            fits = isinstance(value, KINDS.get(field_.type, object))
            if not fits or isinstance(value, bool):
                raise ValueError(
                    f"stage {self.name}: {field_.name} cannot be {value!r}"
                )
            if least is not None and not least <= value < math.inf:
                raise ValueError(
                    f"stage {self.name}: {field_.name} is {value}, not at least {least}"
                )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
            )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Stage":
        return Stage(**{**values, "augment": Augment(**values.get("augment", {}))})


KINDS = {int: int, float: (int, float), str: str}
LEAST = {  # what a field must be at least
    **dict.fromkeys(("size", "epochs", "batch"), 1),
    **dict.fromkeys(("lr", "scale"), 1e-12),
    **dict.fromkeys(("eval_size", "warmup", "weight_decay", "head_lr", "margin"), 0),
    **dict.fromkeys(("clip", "seed", "max_unreadable"), 0),
}
OPTIMIZERS = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr),
}


@dataclass(frozen=True)
class Job:
    """A stage and where it runs: what a process needs to do its part."""

    stage: Stage
    net: nets.NetConfig
    lists: Path  # folder of the image lists
    data: Path  # folder that the lists' paths start from
    runs: Path  # folder of this recipe's stages
    workers: int = 2  # loader processes of each rank
    save_every: int = 200  # steps between two resume states
    log_every: int = 10

    @property
    def folder(self) -> Path:
        return self.runs / self.stage.name

    def write(self) -> Path:
        return files.write_json(
            self.folder / "job.json",
            asdict(self) | {n: str(getattr(self, n)) for n in _PATHS},
        )

    @staticmethod
    def read(path: Path) -> "Job":
        values = files.read_json(path)
        values |= {name: Path(values[name]) for name in _PATHS}
        values["stage"] = Stage.from_dict(values["stage"])
        values["net"] = nets.NetConfig.from_dict(values["net"])
        return Job(**values)


_PATHS = ("lists", "data", "runs")


def change(stage: Stage, **overrides: Any) -> Stage:
    """`stage` with some fields changed, those of `augment` by their own names."""
    own = {f.name for f in dataclasses.fields(Stage)} - {"name", "augment"}
    pixels = {f.name for f in dataclasses.fields(Augment)}
    unknown = sorted(set(overrides) - own - pixels)
    if unknown:
        raise ValueError(
            f"stage {stage.name} has no field {unknown[0]!r}; fields: "
            + ", ".join(sorted(own | pixels))
        )
    augment = dataclasses.replace(
        stage.augment, **{k: v for k, v in overrides.items() if k in pixels}
    )
    changes = {k: v for k, v in overrides.items() if k in own}
    return dataclasses.replace(stage, augment=augment, **changes)


def cosine(step: int, per_epoch: int, stage: Stage) -> float:
    """Learning rate after `step` steps (2021): from 1 % of the peak up in the warm-up, down to 0.2 %.

    The warm-up is not subtracted from the cosine's time, so its end steps down a little.
    """
    t = step / per_epoch
    if t < stage.warmup:
        start = 0.01 * stage.lr
        return start + t * (stage.lr - start) / stage.warmup
    floor = 0.002 * stage.lr
    return floor + 0.5 * (stage.lr - floor) * (
        1 + math.cos(math.pi * min(t / stage.epochs, 1))
    )


class _Step(nn.Module):
    """Network and classifier as one module, so that their gradients travel together."""

    def __init__(self, net: nets.EmbeddingNet, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.net(self.net.config.input.normalise(images)), labels)


def run(job: Job) -> Path:
    """Trains the stage to its end, from its last state if it was interrupted; returns its folder.

    A finished stage of the same configuration is left as it is; another configuration's result in
    the same folder is replaced. On CPU an interrupted and an uninterrupted run give the same bits
    for the same number of processes and threads.
    """
    with launch.group() as rank:
        images = lists.load(job.lists, job.stage.images, ("id", "path", "label"))
        earlier = (
            nets.describe(job.runs / job.stage.init)["hash"] if job.stage.init else ""
        )
        config = files.fingerprint(
            {
                "stage": asdict(job.stage),
                "net": asdict(job.net),
                "list": images.hash,
                "earlier": earlier,
            }
        )
        with files.lock(job.folder) if rank.main else nullcontext():
            done = [rank.main and checkpoints.prepare(job.folder, config)]
            if rank.world > 1:
                dist.broadcast_object_list(
                    done
                )  # rank 0 has the lock, its answer counts
            if not done[0]:
                _Training(job, images, config, rank).run()
    return job.folder


class _Training:
    """The state of one stage while it runs on one rank."""

    def __init__(
        self, job: Job, images: lists.ImageList, config: str, rank: launch.Rank
    ) -> None:
        self.job, self.config, self.rank, stage = job, config, rank, job.stage
        rows = images.rows[images.rows["label"] >= 0]
        self.list = {"name": images.name, "hash": images.hash}
        self.left_out = len(images) - len(rows)
        if rows.empty:
            raise ValueError(f"list {images.name} has no row with a label to train on")
        self.ids = rows["id"].to_numpy().astype("S16")
        classes = int(rows["label"].max()) + 1
        torch.manual_seed(stage.seed)
        shown = dataclasses.replace(job.net.input, size=stage.size)
        kept = dataclasses.replace(shown, size=stage.eval_size or stage.size)
        net_config = dataclasses.replace(job.net, input=kept)
        first = stage.init == ""
        net = nets.build(net_config) if first else nets.EmbeddingNet(net_config)
        head = ArcFace(net.dim, classes, stage.margin, stage.scale)
        self.seen = (
            {} if first else checkpoints.hand_over(job.runs / stage.init, net, head)
        )
        self.seen |= {images.hash: images.name}
        self.step = _Step(net, head).to(rank.device, memory_format=torch.channels_last)
        self.optimizer = OPTIMIZERS[stage.optimizer](
            _groups(net, head, stage), stage.lr
        )
        self.half = nets.half_precision(rank.device)
        self.scaler = torch.amp.GradScaler(enabled=self.half == torch.float16)
        self.done, self.rows, self.unreadable = 0, [], set()
        self.losses: list[Tensor] = []  # since the last line of the log
        self.dataset = TrainImages(
            job.data,
            rows["path"].to_numpy(),
            rows["label"].to_numpy(),
            shown,
            stage.augment,
            stage.seed,
        )
        self._resume()
        self.batches = Batches(
            len(rows),
            stage.batch,
            stage.epochs,
            stage.seed,
            rank=rank.rank,
            world=rank.world,
            start=self.done,
        )

    def _resume(self) -> None:
        state = checkpoints.load_state(self.job.folder, self.config)
        if state is None:
            return
        self.step.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.rows = state["step"], state["log"]
        self.losses = list(state["losses"].to(self.rank.device))
        if self.rank.main:
            self.unreadable = set(state["unreadable"])  # of all ranks
            log.info("stage %s goes on from step %d", self.job.stage.name, self.done)

    def run(self) -> None:
        job, stage, rank, steps = (
            self.job,
            self.job.stage,
            self.rank,
            self.batches.steps,
        )
        module: nn.Module = self.step.train()
        if rank.world > 1:
            module = DistributedDataParallel(
                self.step, [rank.local] if rank.device.type == "cuda" else None
            )
        if rank.main:
            log.info(
                "stage %s: %d images, %d labels, %d steps of %d at %d px (%d rows without label)",
                *(stage.name, len(self.ids), self.step.head.weight.shape[0]),
                *(steps, stage.batch, stage.size, self.left_out),
            )
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=job.workers,
            worker_init_fn=in_worker,
            pin_memory=rank.device.type == "cuda",
        )
        clock, since = time.monotonic(), self.done
        for images, labels, unreadable in loader:
            self.unreadable.update(unreadable[unreadable >= 0].tolist())
            self.losses.append(self._update(module, images, labels))
            self.done += 1
            last = self.done == steps
            if last or self.done % job.log_every == 0:
                self._report(since, clock)
                clock, since = time.monotonic(), self.done
            if not last and self.done % job.save_every == 0:
                self._save_state()
        self._finish()

    def _update(self, module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        stage, device = self.job.stage, self.rank.device
        lr = cosine(self.done, self.batches.per_epoch, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        # dropout and the like depend on (seed, step, rank): nothing of them needs to be saved
        torch.manual_seed((stage.seed * 1_000_003 + self.done) * 4_096 + self.rank.rank)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            loss = module(images.to(device, non_blocking=True), labels.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if stage.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.step.parameters(), stage.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _report(self, since: int, clock: float) -> None:
        """Every rank: the mean loss, a check of it, and the share of unreadable files."""
        stage, world = self.job.stage, self.rank.world
        loss = torch.stack(self.losses).double().mean()
        self.losses = []
        facts = torch.stack([loss, loss.new_tensor(len(self.unreadable))])
        if world > 1:
            dist.all_reduce(facts)
        mean, unreadable = facts[0].item() / world, int(facts[1].item())
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"stage {stage.name}: the loss is {mean} by step {self.done}; "
                "lower lr or raise warmup"
            )
        limit = stage.max_unreadable * len(self.ids)
        # ranks may have met the same file: what counts is their union
        if unreadable > limit and len(bad := self._all_unreadable()) > limit:
            examples = b", ".join(self.ids[bad[:5]]).decode()
            raise ValueError(
                f"stage {stage.name}: {len(bad)} of {len(self.ids)} images cannot be read, more "
                f"than a share of {stage.max_unreadable}; for example {examples}"
            )
        if self.rank.main:
            speed = (self.done - since) * stage.batch / (time.monotonic() - clock)
            lr = self.optimizer.param_groups[0]["lr"]
            epoch = self.done / self.batches.per_epoch
            self.rows.append([self.done, round(epoch, 4), mean, lr, round(speed, 1)])
            left = (self.batches.steps - self.done) * stage.batch / speed
            log.info(
                "%s %5d/%d  epoch %5.2f  loss %7.4f  lr %.2e  %6.1f images/s  %4.0f s left",
                *(
                    stage.name,
                    self.done,
                    self.batches.steps,
                    epoch,
                    mean,
                    lr,
                    speed,
                    left,
                ),
            )

    def _all_unreadable(self) -> list[int]:
        if self.rank.world == 1:
            return sorted(self.unreadable)
        gathered: list[Any] = [None] * self.rank.world
        dist.all_gather_object(gathered, sorted(self.unreadable))
        return sorted(set().union(*gathered))

    def _save_state(self) -> None:
        unreadable = self._all_unreadable()
        if self.rank.main:
            state = {
                "modules": self.step.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.done,
                "log": self.rows,
                "losses": torch.stack(self.losses).cpu()
                if self.losses
                else torch.empty(0),
                "unreadable": unreadable,
            }
            checkpoints.save_state(self.job.folder, self.config, state)
            checkpoints.write_log(self.job.folder, self.rows)

    def _finish(self) -> None:
        unreadable = self._all_unreadable()
        if not self.rank.main:
            return
        checkpoints.write_log(self.job.folder, self.rows)
        checkpoints.save_result(
            self.job.folder,
            self.step.net,
            self.step.head,
            {
                "stage": asdict(self.job.stage),
                "fingerprint": self.config,
                "list": self.list,
                "images": len(self.ids),
                "classes": int(self.step.head.weight.shape[0]),
                "steps": self.done,
                "processes": self.rank.world,
                "final_loss": self.rows[-1][2],
                "unreadable": [self.ids[row].decode() for row in unreadable],
            },
            self.seen,
        )


def _groups(net: nn.Module, head: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Few parameter groups: matrices with weight decay, norms and biases without, the classifier."""
    own = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in own if p.ndim > 1]
    others = [p for p in own if p.ndim <= 1]
    decay = stage.weight_decay
    return [
        {"params": matrices, "weight_decay": decay, "factor": 1.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
        {
            "params": list(head.parameters()),
            "weight_decay": decay,
            "factor": stage.head_lr,
        },
    ]


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    (path,) = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(Job.read(Path(path)))


if __name__ == "__main__":
    main()
