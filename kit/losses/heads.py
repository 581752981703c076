"""Classifiers on embeddings: (B, D) embedding and (B,) labels -> loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit import config
from kit.losses import margins, pairs, sharded

MOST = 1 << 24  # classes: their numbers travel as float32
ANGULAR = ("arcface", "adacos")  # whose margin is an angle
LOSSES = ("arcface", "cosface", "am_softmax", "adacos", "circle", "softmax")


@dataclass(frozen=True)
class Head:
    """What a classifier is and what it minimises."""

    # softmax: products and a bias instead of cosines, hence no margin and no scale
    loss: str = "arcface"
    margin: float = 0.3  # on the angle (arcface, adacos), else on the cosine
    scale: float = 30.0  # of cosines; 0: AdaCos's fixed one. adacos finds its own
    adacos_angle: float = math.pi / 4  # largest it assumes; 1.25 in the 2019 system
    centres: int = 1  # of each class, the nearest counts (sub-center ArcFace: 3)
    rare_margin: float = 0.0  # the rarest class's addition to the margin; 0: off
    rare_power: float = 0.25  # in between by images ** -power, 0 for the largest class
    margin_start: float = 0.0  # where a growing margin begins
    margin_epochs: float = 0.0  # epochs until it has grown to `margin`; 0: at once
    smoothing: float = 0.0  # share of the target that is spread over all classes
    class_power: float = 0.0  # weight of an image: its class's images ** -power, mean 1
    noisy_weight: float = 1.0  # weight of an image whose label is not trusted
    # PartialFC (An et al., 2021): share of the classes in each step's softmax. Another
    # objective than the whole softmax, and not an unbiased estimate of it
    sampled: float = 1.0
    triplet: float = 0.0  # weight of the batch-hard triplet loss; 0: off
    triplet_margin: float = 0.3  # 0: the soft margin
    contrastive: float = 0.0  # weight of the contrastive loss; 0: off
    contrastive_margin: float = 0.7
    centre_loss: float = 0.0  # weight of the distances to class means; 0: off
    centre_rate: float = 0.5  # how fast the means follow

    def __post_init__(self) -> None:
        rest = ("sampled", "adacos_angle", "centres")
        numbers = [name for name in config.field_names(self) if name != "loss"]
        weights = ("noisy_weight", "triplet", "contrastive", "centre_loss")
        distances = ("triplet_margin", "contrastive_margin")
        angular = self.loss in ANGULAR
        config.check(
            self,
            "head",
            least={name: 0 for name in numbers if name not in rest}
            | {"sampled": 1e-9, "adacos_angle": 0, "centres": 1},
            most={"sampled": 1, "adacos_angle": 1.5, "centre_rate": 1}
            | {"scale": 10_000, "centres": 100, "margin_epochs": 10_000}
            | dict.fromkeys(("rare_power", "class_power"), 10)
            | dict.fromkeys(weights, 1_000)
            | dict.fromkeys(distances, 2),  # of vectors of length 1
            below={"smoothing": 1},
            choices={"loss": LOSSES},
        )
        largest = math.pi / 2 if angular else 1.0
        for names in (("margin",), ("margin_start",), ("margin", "rare_margin")):
            value = sum(getattr(self, name) for name in names)
            if value > largest:
                hint = f", an angle in radians; {value:g} degrees are {math.radians(value):.4f}"
                raise ValueError(
                    f"head: {' + '.join(names)} is {value:g}, not at most {largest:g} for "
                    f"{self.loss}{hint if angular else ''}"
                )
        if self.loss == "softmax" and self.centres > 1:
            raise ValueError(
                "head: softmax has no centres to choose from; set centres=1"
            )
        if self.loss in ("softmax", "circle") and self.rare_margin:
            raise ValueError(
                f"head: {self.loss} has no margin of a class; set rare_margin=0"
            )


class Classifier(nn.Module):
    """The classes of one rank, of all where there is one; the loss is that of all ranks.

    Rank r holds a contiguous share of the classes, and of `weight` their rows, those of a
    class adjacent. Ranks must not be averaged: keep it out of DistributedDataParallel.
    """

    def __init__(
        self, head: Head, dim: int, counts: Tensor, rank: int = 0, world: int = 1
    ) -> None:
        """counts: (C,) images of each class, on every rank of all classes."""
        super().__init__()
        self.head, self.rank, self.world = head, rank, world
        self.classes = len(counts)
        if self.classes < 3 and (head.loss == "adacos" or not head.scale):
            raise ValueError(f"{self.classes} classes are too few for AdaCos's scale")
        if self.classes > MOST:
            raise ValueError(f"{self.classes} classes are more than {MOST}")
        if self.classes < world:
            raise ValueError(
                f"{self.classes} classes do not spread over {world} ranks; launch fewer"
            )
        self.start, self.end = sharded.share(self.classes, rank, world)
        rows = self.end - self.start
        self.weight = nn.Parameter(torch.empty(rows * head.centres, dim))
        if head.loss == "softmax":
            self.bias = nn.Parameter(torch.zeros(rows))
        if head.loss == "adacos":
            scale = margins.fixed_scale(self.classes, head.adacos_angle)
            self.register_buffer("scale", torch.tensor(scale))
        if head.centre_loss:
            self.register_buffer("means", torch.zeros(rows, dim))
        if head.centres > 1:  # a state tells what its rows are
            self.register_buffer("centres", torch.tensor(head.centres))
        rare = head.rare_margin * margins.rarity(counts, head.rare_power)
        self.register_buffer("class_margins", rare, persistent=False)
        weights = counts.clamp(min=1).double() ** -head.class_power
        weights *= counts.sum() / (weights * counts).sum().clamp(min=1e-12)
        self.register_buffer("class_weights", weights.float(), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws the rows anew, xavier_uniform of the whole matrix: the same at any world size."""
        rows, dim = self.classes * self.head.centres, self.weight.shape[1]
        first = self.start * self.head.centres
        bound = math.sqrt(6 / (rows + dim))
        for start in range(0, rows, 4096):
            block = torch.empty(min(4096, rows - start), dim).uniform_(-bound, bound)
            low = max(start, first)
            high = min(start + len(block), first + len(self.weight))
            if low < high:
                own = block[low - start : high - start]
                self.weight[low - first : high - first] = own

    def forward(
        self,
        embedding: Tensor,
        labels: Tensor,
        trusted: Tensor | None = None,
        epoch: float = 0.0,
    ) -> Tensor:
        """Mean over the images of all ranks, the same number on each of them.

        embedding (b, D), labels (b,), trusted (b,) bool: this rank's images, as many on
        every rank. The weights of images are not divided by their sum.
        """
        # float32 under autocast too: half-precision logits near the scale are 1/64 apart
        with torch.autocast(embedding.device.type, enabled=False):
            x, labels, trusted = self._gathered(embedding, labels, trusted)
            mine = (labels >= self.start) & (labels < self.end)
            local = torch.where(mine, labels - self.start, -1)
            losses = self._softmax(x, labels, local, epoch)
            weights = self.class_weights[labels]
            weights = weights.where(trusted, weights * self.head.noisy_weight)
            return (losses * weights).mean() + self._pairs(x, labels, local)

    def full_state(self) -> dict[str, Tensor] | None:
        """What `state_dict` has, of all classes, on rank 0's CPU; None on other ranks.

        Every rank must call it. With one rank on the CPU the tensors are our own.
        """
        found = {
            name: self.gather(value) if value.ndim else value.detach().cpu()
            for name, value in self.state_dict().items()
        }
        return None if self.rank else found

    def load_full(
        self, state: Mapping[str, Tensor], source: object = "classifier"
    ) -> None:
        """Takes this rank's part of a `full_state`, of any number of ranks; strict.

        Of fewer classes than ours it fills the first, the others stay as they are.
        source: what to call the state in an error.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            (name, *_) = sorted(own.keys() ^ state.keys())
            kind = "missing" if name in own else "unknown"
            raise ValueError(f"{source}: {name} is {kind} for loss {self.head.loss}")
        if self.head.centres > 1 and state["centres"] != self.head.centres:
            raise ValueError(
                f"{source}: {state['centres']} centres a class, not {self.head.centres}"
            )
        share = (self.classes, self.rank, self.world)
        parts = {
            name: sharded.grown_rows(value, state[name], *share, f"{source}: {name}")
            if value.ndim
            else state[name]
            for name, value in own.items()
        }
        self.load_state_dict(parts)

    def gather(self, part: Tensor) -> Tensor | None:
        """This rank's rows of anything like a parameter (its momentum) -> all, on rank 0's CPU.

        None on other ranks. Every rank must call it.
        """
        return sharded.gather_rows(part, self.classes, self.rank, self.world)

    def rows(self, full: Tensor) -> Tensor:
        """All rows -> a view of those of this rank: `gather` undone."""
        return sharded.own_rows(full, self.classes, self.rank, self.world)

    def _gathered(
        self, embedding: Tensor, labels: Tensor, trusted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings in float32, labels and trust of all ranks, in one exchange."""
        trusted = torch.ones_like(labels) if trusted is None else trusted
        facts = torch.stack([labels, trusted.to(labels)], 1)
        x = embedding.float()
        if self.world > 1:  # labels are exact in float32, see MOST
            full = sharded.gathered(torch.cat([x, facts.float()], 1), self.world)
            x, facts = full[:, :-2], full[:, -2:].detach().long()
        labels, trusted = facts.unbind(1)
        if labels.device.type == "cpu" and not (
            labels.min() >= 0 and labels.max() < self.classes
        ):  # a GPU would have to wait for the answer
            raise IndexError(f"a label is not one of {self.classes} classes")
        return x, labels, trusted.bool()

    def _softmax(
        self, x: Tensor, labels: Tensor, local: Tensor, epoch: float
    ) -> Tensor:
        """(B,) cross entropies; labels of all classes, local among this rank's or -1."""
        head, weight, classes = self.head, self.weight, self.classes
        bias = self.bias if head.loss == "softmax" else None
        if head.sampled < 1 and self.training:
            kept, classes = self._sample(local)
            row = torch.arange(head.centres, device=kept.device)
            weight = weight.index_select(
                0, (kept[:, None] * head.centres + row).flatten()
            )
            bias = None if bias is None else bias[kept]
            local = torch.where(local < 0, -1, torch.searchsorted(kept, local))
        if head.loss == "softmax":
            logits = F.linear(x, weight, bias)
        else:
            cosines = sharded.cosines(F.normalize(x), weight)
            cosines = margins.sub_centres(cosines, head.centres)
            logits = self._logits(cosines, labels, local, epoch)
        return sharded.softmax_losses(
            logits, local, head.smoothing, world=self.world, classes=classes
        )

    def _logits(
        self, cosines: Tensor, labels: Tensor, local: Tensor, epoch: float
    ) -> Tensor:
        head = self.head
        margin = margins.growing(
            epoch, head.margin_start, head.margin, head.margin_epochs
        )
        if head.rare_margin:
            margin = margin + self.class_margins[labels]
        if head.loss == "adacos":
            if self.training:
                self._rescale(cosines.detach(), local)
            return margins.arcface(cosines, local, margin, self.scale.clone())
        function = getattr(margins, head.loss)
        scale = head.scale or margins.fixed_scale(self.classes)
        return function(cosines, local, margin, scale)

    def _sample(self, local: Tensor) -> tuple[Tensor, int]:
        """Classes of this rank in this step, sorted, and how many there are on all ranks.

        The batch's own and others at random, from torch's generator: seeded by step, a
        resumed run draws as an uninterrupted one.
        """
        sizes = []
        for rank in range(self.world):
            start, end = sharded.share(self.classes, rank, self.world)
            least = min(len(local), end - start)  # so that the batch's own always fit
            sizes.append(max(least, math.ceil(self.head.sampled * (end - start))))
        draw = torch.rand(self.end - self.start, device=local.device)
        draw[local[local >= 0]] = 2
        return draw.topk(sizes[self.rank]).indices.sort().values, sum(sizes)

    @torch.no_grad()
    def _rescale(self, cosines: Tensor, local: Tensor) -> None:
        """AdaCos: the scale that this batch asks for."""
        columns, here = local.clamp(min=0)[:, None], local >= 0
        targets = cosines.gather(1, columns)
        others = torch.where(here[:, None], -math.inf, targets * self.scale)
        others = (cosines * self.scale).scatter_(1, columns, others).logsumexp(1)
        parts = torch.stack([others, targets.squeeze(1).where(here, 0)])
        parts = sharded.gathered(parts[None], self.world)  # (world, 2, B)
        self.scale.copy_(
            margins.dynamic_scale(
                parts[:, 0].logsumexp(0), parts[:, 1].sum(0), self.head.adacos_angle
            )
        )

    def _pairs(self, x: Tensor, labels: Tensor, local: Tensor) -> Tensor:
        """Weighted sum of the losses between images, and between images and class means."""
        head, total = self.head, x.new_zeros(())
        if head.triplet:
            total = total + head.triplet * pairs.triplet(x, labels, head.triplet_margin)
        if head.contrastive:
            pull = pairs.contrastive(x, labels, head.contrastive_margin)
            total = total + head.contrastive * pull
        if self.world > 1 and total.requires_grad:
            # every rank has all of this gradient, and `gathered` adds the ranks' up
            total.register_hook(lambda gradient: gradient / self.world)
        if head.centre_loss:
            own = pairs.centre_distances(x, self.means, local)
            total = total + head.centre_loss * sharded.summed(own, self.world).mean()
            if self.training:
                pairs.move_means(self.means, x.detach(), local, head.centre_rate)
        return total
