"""One rank's part of a classifier whose classes are spread over ranks: products, softmax, rows.

Everything here also runs alone (world 1), without a process group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {
    "cpu": 1 << 19
}  # numbers of a block of centres, see _Cosines; elsewhere 2 ** 24


def share(classes: int, rank: int, world: int) -> tuple[int, int]:
    """First class of a rank and the first one after its last; shares differ by 1 at most."""
    each, more = divmod(classes, world)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def gathered(batch: Tensor, world: int) -> Tensor:
    """(b, ...) of each rank -> (world * b, ...) of all, in the order of ranks.

    Its gradient is the sum of what all ranks make of it, times `world`: the network under
    the batch is wrapped in DistributedDataParallel, which divides by `world` again.
    """
    return batch if world == 1 else _Gathered.apply(batch, world)


def summed(part: Tensor, world: int) -> Tensor:
    """Sum over ranks; each rank's gradient stays with its own part."""
    return part if world == 1 else _Summed.apply(part)


def cosines(embedding: Tensor, centres: Tensor) -> Tensor:
    """(B, D) of length 1, (C, D) of any length -> (B, C).

    As `embedding @ normalize(centres).T`, without a normalised copy of the centres.
    """
    return _Cosines.apply(embedding, centres)


def softmax_losses(
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    *,
    world: int = 1,
    classes: int | None = None,
) -> Tensor:
    """Cross entropy of each image, (B,), the same on all ranks.

    logits (B, c): of the classes that this rank holds; labels (B,): columns of it, or -1
    where another rank holds the image's class; classes: how many all ranks hold.
    """
    classes = logits.shape[1] if classes is None else classes
    return _SoftmaxLosses.apply(logits, labels, smoothing / classes, smoothing, world)


def gather_rows(part: Tensor, classes: int, rank: int, world: int) -> Tensor | None:
    """This rank's rows, some of each class -> all rows on rank 0's CPU, None elsewhere."""
    own = part.detach().contiguous()
    if world == 1:
        return own.cpu()
    if rank:
        dist.send(own, 0)
        return None
    start, end = share(classes, 0, world)
    each = len(own) // (end - start)  # rows of a class
    full = own.new_empty(classes * each, *own.shape[1:], device="cpu")
    full[: len(own)] = own
    for other in range(1, world):
        start, end = share(classes, other, world)
        received = own.new_empty((end - start) * each, *own.shape[1:])
        dist.recv(received, other)
        full[start * each : end * each] = received
    return full


def own_rows(full: Tensor, classes: int, rank: int, world: int) -> Tensor:
    """All rows, as many of each class -> a view of those of this rank."""
    each = len(full) // classes
    start, end = share(classes, rank, world)
    return full[start * each : end * each]


def grown_rows(
    own: Tensor, full: Tensor, classes: int, rank: int, world: int, name: str
) -> Tensor:
    """This rank's rows of `full`; where that has fewer classes, `own` rows after them."""
    start, end = share(classes, rank, world)
    each = len(own) // (end - start)
    if full.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"{name} has rows of {tuple(full.shape[1:])}, not {tuple(own.shape[1:])}"
        )
    if len(full) > classes * each:
        raise ValueError(f"{name}: {len(full) // each} classes do not fit in {classes}")
    part = full[start * each : end * each].to(own)
    return torch.cat([part, own.detach()[len(part) :]])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: Tensor, world: int) -> Tensor:
        ctx.world, ctx.size = world, len(batch)
        return _all_gather(batch, world)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(ctx.size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own.mul_(ctx.world), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Cosines(torch.autograd.Function):
    """Backward in blocks of centres that stay in the cache, straight into the gradient."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, centres: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(centres, dim=1).clamp_(min=1e-12)
        ctx.save_for_backward(embedding, centres, lengths)
        return (embedding @ centres.T).div_(lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        embedding, centres, lengths = ctx.saved_tensors
        to_embedding, to_centres = ctx.needs_input_grad
        d_embedding = torch.zeros_like(embedding) if to_embedding else None
        d_centres = torch.empty_like(centres) if to_centres else None
        size = max(1, BLOCK.get(centres.device.type, 1 << 24) // centres.shape[1])
        for start in range(0, len(centres), size):
            rows = slice(start, start + size)
            block, length = centres[rows], lengths[rows]
            slopes = gradient[:, rows] / length
            if to_embedding:
                d_embedding.addmm_(slopes, block)
            if to_centres:
                # of the products, less what would only change the centre's length
                into = torch.mm(slopes.T, embedding, out=d_centres[rows])
                along = (into * block).sum(1).div_(length.square())
                into.addcmul_(block, along[:, None], value=-1)
        return d_embedding, d_centres


class _SoftmaxLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, each: float, off: float, world: int
    ) -> Tensor:
        """Loss: log sum exp - (1 - off) * the label's logit - each * the sum of all logits."""
        highest = logits.amax(1)
        powers = logits - highest[:, None]
        columns, here = labels.clamp(min=0)[:, None], labels >= 0
        target = logits.gather(1, columns).squeeze(1).where(here, 0)
        level = logits.sum(1) if each else torch.zeros_like(target)
        log_sum = highest + powers.exp_().sum(1).log()
        parts = torch.stack([log_sum, target, level])[None]
        parts = _all_gather(
            parts, world
        )  # (world, 3, B), the step's only other exchange
        log_sum, (target, level) = parts[:, 0].logsumexp(0), parts[:, 1:].sum(0)
        ctx.save_for_backward(powers, (highest - log_sum).exp(), columns, here)
        ctx.each, ctx.off = each, off
        return log_sum - (1 - off) * target - each * level

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        powers, factor, columns, here = ctx.saved_tensors
        slopes = powers * (gradient * factor)[:, None]
        if ctx.each:
            slopes -= ctx.each * gradient[:, None]
        taken = torch.where(here, (ctx.off - 1) * gradient, 0)
        return slopes.scatter_add_(1, columns, taken[:, None]), None, None, None, None


def _all_gather(part: Tensor, world: int) -> Tensor:
    if world == 1:
        return part
    full = part.new_empty(world * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(full, part.contiguous())
    return full
