"""Optimisers, their parameter groups and learning rates, as both systems had them and as ViTs want them."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm.models
import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kit import config
from kit.models.net import EmbeddingNet

# of timm's factory; "momentum" is plain SGD with momentum, "sgd" Nesterov's
OPTIMIZERS = ("momentum", "sgd", "adamw", "lamb", "lion")
SCHEDULES = ("cosine", "multistep")
Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Optim:
    """How weights follow their gradients."""

    lr: float = 1e-2  # peak of the schedule
    optimizer: str = "momentum"  # see OPTIMIZERS
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of matrices and filters, and of the classifier
    norm_decay: float = 0.0  # of the norms' weights; both published systems: as all
    bias_decay: float = 0.0
    bias_lr: float = 1.0  # learning rate of biases, as a multiple; 2 in 2021
    head_lr: float = 1.0  # of the classifier, as a multiple
    layer_decay: float = 1.0  # of the learning rate, from each block to the one before
    clip: float = 0.0  # largest norm of the gradient; 0: unlimited
    schedule: str = "cosine"  # or "multistep"
    floor: float = 0.002  # where the cosine ends, as a share of lr
    warmup: float = 0.0  # epochs; not subtracted from the schedule's time (2021)
    warmup_from: float = 0.01  # share of lr at its start
    milestones: tuple[float, ...] = ()  # epochs at which multistep multiplies by gamma
    gamma: float = 0.1

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("weight_decay", "norm_decay", "bias_decay", "clip", "floor", "warmup"), 0
        )
        positive = dict.fromkeys(("lr", "bias_lr", "head_lr", "layer_decay"), 1e-12)
        config.check(
            self,
            least=least | positive | {"momentum": 0, "warmup_from": 0, "gamma": 0},
            most=dict.fromkeys(("layer_decay", "floor", "warmup_from", "gamma"), 1)
            | dict.fromkeys(("weight_decay", "norm_decay", "bias_decay"), 10)
            | dict.fromkeys(("bias_lr", "head_lr", "warmup"), 10_000)
            | {"lr": 1e12, "clip": 1e9},
            below={"momentum": 1},
            choices={"optimizer": OPTIMIZERS, "schedule": SCHEDULES},
        )
        if list(self.milestones) != sorted(set(self.milestones)) or any(
            each < 0 for each in self.milestones
        ):
            raise ValueError(
                f"milestones are {self.milestones}; they rise, and the first is not below 0"
            )


def learning_rate(how: Optim, epoch: float, epochs: int) -> float:
    """At a fractional epoch of a schedule of `epochs`.

    Cosine: up from a share of the peak in the warm-up, then down to the floor. The warm-up is not
    subtracted from the cosine's time, so its end steps down a little (2021).
    """
    if epoch < how.warmup:
        start = how.warmup_from * how.lr
        return start + epoch * (how.lr - start) / how.warmup
    if how.schedule == "multistep":
        return how.lr * how.gamma ** sum(epoch >= each for each in how.milestones)
    low = how.floor * how.lr
    turn = math.pi * min(epoch / epochs, 1.0)
    return low + 0.5 * (how.lr - low) * (1 + math.cos(turn))


def build(
    net: EmbeddingNet, head: nn.Module, how: Optim
) -> tuple[Optimizer, Optimizer]:
    """One optimiser for the network and one for the classifier, whose rows each rank has a share of."""
    rows = [
        {"params": list(head.parameters()), "weight_decay": how.weight_decay}
        | {"factor": how.head_lr}
    ]
    return _create(_groups(net, how), how), _create(rows, how)


def _create(groups: list[dict[str, Any]], how: Optim) -> Optimizer:
    return timm.optim.create_optimizer_v2(
        groups, how.optimizer, lr=how.lr, weight_decay=0.0, momentum=how.momentum
    )


def _groups(net: EmbeddingNet, how: Optim) -> list[dict[str, Any]]:
    """Few groups: by kind of parameter, and by block where the learning rate falls with depth."""
    depth = _depths(net) if how.layer_decay < 1 else {}
    deepest = max(depth.values(), default=0)
    members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in net.named_parameters():
        decay, factor = how.weight_decay, 1.0
        if name.endswith(".p"):  # GeM's power: decay would pull it to zero
            decay = 0.0
        elif name.endswith("bias"):
            decay, factor = how.bias_decay, how.bias_lr
        elif parameter.ndim <= 1:
            decay = how.norm_decay
        factor *= how.layer_decay ** (deepest - depth.get(name, deepest))
        members[decay, factor].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in members.items()
    ]


def _depths(net: EmbeddingNet) -> dict[str, int]:
    """Block number of each of the backbone's parameters, the input's is 0; others are deepest."""
    backbone = net.backbone
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(
            f"{net.config.backbone} does not name its blocks: set layer_decay=1"
        )
    matcher = backbone.group_matcher(coarse=False)
    found = timm.models.group_parameters(backbone, matcher, reverse=True)
    return {f"backbone.{name}": layer for name, layer in found.items()}


def set_learning_rate(optimizers: tuple[Optimizer, ...], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]


def clip(net: nn.Module, head: nn.Module, limit: float, world: int) -> None:
    """Scales all gradients so that their common norm is at most `limit`; ranks have shares of the head."""
    whole = nn.utils.get_total_norm(_gradients(net))
    share = nn.utils.get_total_norm(_gradients(head)).square()
    if world > 1:
        dist.all_reduce(share)
    norm = (whole.square() + share).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*_gradients(net), *_gradients(head)):
        gradient.mul_(factor)


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in _parameters(module) if p.grad is not None]


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)
