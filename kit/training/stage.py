"""One training stage: image list -> checkpoint, on one process or many, resumable at any step.

`python -m kit.training.stage JOB.json`, alone or under torchrun; `run` does the work.
"""

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from kit import config, files, launch
from kit.data import lists
from kit.data.decode_gpu import JpegImages, collate, on_device
from kit.data.images import TrainImages, in_worker
from kit.data.samplers import Batches
from kit.losses.heads import Classifier
from kit.models import lora
from kit.models import net as nets
from kit.training import checkpoints, optim
from kit.training.job import Job

log = logging.getLogger(__name__)
# asked for on CPU for another reason, see _wrap
warnings.filterwarnings("ignore", message="find_unused_parameters=True")


def run(job: Job) -> Path:
    """Trains the stage to its end, from its last state if it was interrupted; returns its folder.

    A finished stage of the same configuration is left as it is; another configuration's result in
    the same folder is replaced. On CPU an interrupted and an uninterrupted run give the same bits
    for the same number of processes and threads. Raises launch.Stopped when the time is over that
    the environment grants, after it has saved where it was.
    """
    with launch.group() as rank:
        job.check_parts(rank.world)
        images = lists.load(job.lists, job.stage.images, _columns(job))
        earlier = (
            nets.describe(job.runs / job.stage.init)["hash"] if job.stage.init else ""
        )
        made_by = files.fingerprint(
            {
                "stage": config.to_dict(job.stage),
                "net": config.to_dict(job.net),
                "list": images.hash,
                "earlier": earlier,
            }
        )
        with files.lock(job.folder) if rank.main else nullcontext():
            done = [rank.main and checkpoints.prepare(job.folder, made_by)]
            if rank.world > 1:  # rank 0 has the lock, its answer counts
                dist.broadcast_object_list(done)
            if not done[0]:
                _Training(job, images, made_by, rank).run()
    return job.folder


def _columns(job: Job) -> tuple[str, ...]:
    """Columns of the list that this stage needs: text of millions of rows weighs gigabytes."""
    columns = ["id", "path", "label", "clean"]
    if job.stage.sampling.order == "continent":
        columns.append("continent")
    if job.stage.template:
        columns += ["height", "width"]
    return tuple(columns)


class _Parts(Sampler[list[tuple[int, int]]]):
    """Every batch in `parts` equal pieces, one after the other."""

    def __init__(self, batches: Batches, parts: int) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.batches) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            size = len(batch) // self.parts
            for start in range(0, len(batch), size):
                yield batch[start : start + size]


class _Training:
    """The state of one stage while it runs on one rank."""

    def __init__(
        self, job: Job, images: lists.ImageList, made_by: str, rank: launch.Rank
    ) -> None:
        self.job, self.made_by, self.rank, stage = job, made_by, rank, job.stage
        rows = images.rows[images.rows["label"] >= 0]
        if rows.empty:
            raise ValueError(f"list {images.name} has no row with a label to train on")
        self.list = {"name": images.name, "hash": images.hash}
        self.left_out = len(images) - len(rows)
        self.ids = rows["id"].to_numpy().astype("S16")
        labels = rows["label"].to_numpy()
        self.counts = torch.from_numpy(np.bincount(labels))
        self._build()
        self.seen[images.hash] = images.name
        self.done, self.rows, self.unreadable = 0, [], set()
        self.losses: list[Tensor] = []  # since the last line of the log
        self._resume()
        sizes = rows[["height", "width"]].to_numpy() if stage.template else None
        of = JpegImages if job.gpu_decode else TrainImages
        self.dataset = of(
            job.data,
            rows["path"].to_numpy(),
            labels,
            job.shown,
            stage.augment,
            stage.seed,
            trusted=rows["clean"].to_numpy() > 0,
            sizes=sizes,
        )
        self.batches = Batches(
            stage.sampling,
            labels,
            stage.batch,
            stage.start,
            stage.last,
            stage.seed,
            clean=rows["clean"].to_numpy() > 0,
            continents=rows.get("continent"),
            groups=job.shown.group(*sizes.T) if stage.template else None,
            name=f"list {images.name}",
            rank=rank.rank,
            world=rank.world,
            step=self.done,
        )

    def _build(self) -> None:
        """Network, classifier and optimisers, filled by the earlier stage."""
        job, stage, rank = self.job, self.job.stage, self.rank
        torch.manual_seed(stage.seed)
        first = stage.init == ""
        self.net = nets.build(job.kept) if first else nets.EmbeddingNet(job.kept)
        self.head = Classifier(
            stage.head, self.net.dim, self.counts, rank.rank, rank.world
        )
        self.seen = {}
        if not first:
            earlier = job.runs / stage.init
            head = self.head if stage.keep_head else None
            self.seen = checkpoints.hand_over(earlier, self.net, head)
        if stage.frozen_norms:
            nets.freeze_norms(self.net)
        if stage.sync_norms and rank.world > 1 and rank.device.type == "cuda":
            nets.sync_norms(self.net)
        if stage.lora:
            lora.add(self.net, stage.lora)
        if job.checkpointing:
            nets.checkpoint_activations(self.net)
        form = torch.channels_last if job.channels_last else torch.contiguous_format
        self.net.to(rank.device, memory_format=form)
        self.head.to(rank.device)
        self.optimizers = optim.build(self.net, self.head, stage.optim)
        self.average = ModelEmaV3(self.net, decay=stage.ema) if stage.ema else None
        self.half = nets.half_precision(rank.device)
        scaler = ShardedGradScaler if rank.world > 1 else torch.amp.GradScaler
        self.scaler = scaler(enabled=self.half == torch.float16)

    # --- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        job, stage, rank, steps = (
            self.job,
            self.job.stage,
            self.rank,
            self.batches.steps,
        )
        if rank.main:
            log.info(
                "stage %s: %d images, %d labels, %d steps of %d at %d px (%d rows without label, "
                "%d that no batch has)",
                *(stage.name, len(self.ids), len(self.counts)),
                *(steps, stage.batch, stage.size, self.left_out, self.batches.unseen),
            )
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Parts(self.batches, job.accumulate),
            num_workers=job.workers,
            worker_init_fn=in_worker,
            collate_fn=collate if job.gpu_decode else None,
            pin_memory=rank.device.type == "cuda",
        )
        parts = iter(loader)
        self._wrap()
        with checkpoints.Scalars(job.folder, self.done, rank.main) as self.scalars:
            self._tick()
            while self.done < steps:
                self.losses.append(self._update(parts))
                self.done += 1
                if self.done == self._unfreezing:
                    self._wrap()
                last = self.done == steps
                if last or self.done % job.log_every == 0:
                    self._report()
                if not last and self.done % job.save_every == 0:
                    self._save_state()
        self._finish()

    @property
    def _unfreezing(self) -> int:
        """The step at which the backbone starts to learn."""
        return self.job.stage.freeze * self.batches.per_epoch

    def _wrap(self) -> None:
        """Sets what learns; DistributedDataParallel counts those parameters when it is made."""
        self.net.train()
        frozen = self.done < self._unfreezing
        if self.job.stage.freeze:
            self.net.backbone.requires_grad_(not frozen).train(not frozen)
        self.module: nn.Module = self.net
        if self.rank.world > 1:
            cuda = self.rank.device.type == "cuda"
            self.module = DistributedDataParallel(
                self.net,
                [self.rank.local] if cuda else None,
                # else it sorts its buckets anew after the first step, and the order in which
                # three or more ranks are added would depend on when a run was interrupted
                find_unused_parameters=not cuda,
            )
        if self.job.compile:
            self.module = torch.compile(self.module)

    def _update(self, parts: Iterator[Any]) -> Tensor:
        """One step: gradients of all parts of the batch, then the optimisers; returns the loss."""
        stage, count = self.job.stage, self.job.accumulate
        epoch = stage.start + self.done / self.batches.per_epoch
        lr = optim.learning_rate(stage.optim, epoch, stage.epochs)
        optim.set_learning_rate(self.optimizers, lr)
        # dropout and the like depend on (seed, step, rank): nothing of them needs to be saved
        torch.manual_seed((stage.seed * 1_000_003 + self.done) * 4_096 + self.rank.rank)
        total = torch.zeros((), device=self.rank.device)
        for part in range(count):
            waits = part < count - 1 and self.rank.world > 1
            with self.module.no_sync() if waits else nullcontext():
                loss = self._loss(parts, epoch) / count
                again = self.job.checkpointing
                with nets.statistics_kept(self.net) if again else nullcontext():
                    self.scaler.scale(loss).backward()
            total += loss.detach()
        if stage.optim.clip:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            optim.clip(self.net, self.head, stage.optim.clip, self.rank.world)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.net)
        return total

    def _loss(self, parts: Iterator[Any], epoch: float) -> Tensor:
        before = time.monotonic()
        batch = next(parts)
        self.waited += time.monotonic() - before
        device = self.rank.device
        if self.job.gpu_decode:
            batch = on_device(batch, self.job.shown, self.job.stage.augment, device)
        images, labels, unreadable, trusted, *_ = batch
        self.unreadable.update(unreadable[unreadable >= 0].tolist())
        images = images.to(device, non_blocking=True)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            embedding = self.module(self.job.shown.normalise(images))
        return self.head(embedding, labels.to(device), trusted.to(device), epoch)

    # --- what is told, and kept -----------------------------------------------------------------

    def _tick(self) -> None:
        self.clock, self.since, self.waited = time.monotonic(), self.done, 0.0

    def _report(self) -> None:
        """A line of the log, after a check of the losses, the unreadable files and the time."""
        stage, rank = self.job.stage, self.rank
        mean = self._checked_losses().mean().item()
        self.losses = []
        over = launch.time_left() <= 0
        facts = torch.tensor([len(self.unreadable), over], dtype=torch.float64)
        facts = facts.to(rank.device, torch.float32)
        if rank.world > 1:
            dist.all_reduce(facts)
        self._check_readable(int(facts[0]))
        if rank.main:
            seconds = time.monotonic() - self.clock
            speed = (self.done - self.since) * stage.batch / seconds
            epoch = stage.start + self.done / self.batches.per_epoch
            row = checkpoints.LogRow(
                step=self.done,
                epoch=round(epoch, 4),
                loss=mean,
                lr=self.optimizers[0].param_groups[0]["lr"]
                / self.optimizers[0].param_groups[0]["factor"],
                images_per_second=round(speed, 1),
                waiting=round(self.waited / seconds, 3),
                gpu_gb=round(_peak_gb(rank.device), 2),
            )
            self.rows.append(row)
            self.scalars.add(row)
            left = (self.batches.steps - self.done) * stage.batch / speed
            log.info(
                "%s %5d/%d  epoch %5.2f  loss %7.4f  lr %.2e  %6.1f images/s  "
                "%2.0f %% waiting for data  %4.0f s left",
                *(stage.name, self.done, self.batches.steps, epoch, mean, row.lr),
                *(speed, 100 * row.waiting, left),
            )
        self._tick()
        if facts[1] and self.done < self.batches.steps:
            self._save_state()
            raise launch.Stopped(
                f"stage {stage.name}: stopped at step {self.done} of {self.batches.steps}, the time "
                "is over; run it again to go on"
            )

    def _checked_losses(self) -> Tensor:
        """(n,) float64 on CPU, the same on every rank; refuses a loss that is no number."""
        losses = torch.stack(self.losses).double().cpu()
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step = self.done - len(losses) + int(wrong[0]) + 1
            raise FloatingPointError(
                f"stage {self.job.stage.name}: the loss is {losses[wrong[0]].item()} at step {step}; "
                "lower lr or raise warmup (the last saved state is before it)"
            )
        return losses

    def _check_readable(self, count: int) -> None:
        limit = self.job.stage.max_unreadable * len(self.ids)
        # ranks may have met the same file: what counts is their union
        if count > limit and len(bad := self._all_unreadable()) > limit:
            examples = ", ".join(self.dataset.path(row) for row in bad[:5])
            raise ValueError(
                f"stage {self.job.stage.name}: {len(bad)} of {len(self.ids)} images cannot be read, "
                f"more than a share of {self.job.stage.max_unreadable}; for example {examples}"
            )

    def _all_unreadable(self) -> list[int]:
        if self.rank.world == 1:
            return sorted(self.unreadable)
        gathered: list[Any] = [None] * self.rank.world
        dist.all_gather_object(gathered, sorted(self.unreadable))
        return sorted(set().union(*gathered))

    def _save_state(self) -> None:
        if self.losses:
            self._checked_losses()  # nothing is saved that has seen a loss of no number
        unreadable = self._all_unreadable()
        head = self.head.full_state()
        of_head = checkpoints.gathered(self.optimizers[1].state_dict(), self.head)
        if self.rank.main:
            losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
            state = {
                "net": self.net.state_dict(),
                "head": head,
                "optimizers": [self.optimizers[0].state_dict(), of_head],
                "scaler": self.scaler.state_dict(),
                "average": self.average.module.state_dict() if self.average else {},
                "step": self.done,
                "log": [list(row) for row in self.rows],
                "losses": losses,
                "unreadable": unreadable,
            }
            checkpoints.save_state(self.job.folder, self.made_by, state)
            checkpoints.write_log(self.job.folder, self.rows)

    def _resume(self) -> None:
        state = checkpoints.load_state(self.job.folder, self.made_by)
        if state is None:
            return
        self.net.load_state_dict(state["net"])
        self.head.load_full(state["head"])
        of_net, of_head = state["optimizers"]
        self.optimizers[0].load_state_dict(of_net)
        self.optimizers[1].load_state_dict(checkpoints.split(of_head, self.head))
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.done = state["step"]
        self.rows = [checkpoints.LogRow(*row) for row in state["log"]]
        self.losses = list(state["losses"].to(self.rank.device))
        if self.rank.main:
            self.unreadable = set(state["unreadable"])  # of all ranks
            log.info("stage %s goes on from step %d", self.job.stage.name, self.done)

    def _finish(self) -> None:
        unreadable = self._all_unreadable()
        head = self.head.full_state()
        if not self.rank.main:
            return
        net = self.net if self.average is None else self.average.module
        checkpoints.write_log(self.job.folder, self.rows)
        checkpoints.save_result(
            self.job.folder,
            lora.merged(net) if self.job.stage.lora else net,
            head,
            {
                "stage": config.to_dict(self.job.stage),
                "fingerprint": self.made_by,
                "list": self.list,
                "images": len(self.ids),
                "classes": len(self.counts),
                "steps": self.done,
                "processes": self.rank.world,
                "final_loss": self.rows[-1].loss,
                "unreadable": [self.ids[row].decode() for row in unreadable],
            },
            self.seen,
        )


def _peak_gb(device: torch.device) -> float:
    """Of GPU memory since the start; 0 on CPU."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    job = config.read_argument(Job, arguments, __doc__.partition("\n")[0])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(job)


if __name__ == "__main__":
    main()
