"""FishNet (Sun et al., NeurIPS 2018) for timm: images (B, 3, H, W) -> maps at four strides.

Channels of FishNet-150 at each stride; tail and head go down the table, the body goes up:

    stride   tail     body     head
         4     64      320
         8    128      512      832
        16    256      768     1600
        32    512 ->   512     2112      (-> is the bridge)

A block of body or head refines the map before it, brings it to its own stride and concatenates
what the part to the left holds there, so that nothing seen at any stride is lost on the way.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PARTS = ("tail", "bridge", "body", "head")
DEPTHS = {  # bottlenecks a stage; in body and head: (those that refine, those that transfer)
    "fishnet99": ((2, 2, 6), 2, ((1, 1), (1, 1), (1, 1)), ((1, 1), (2, 1), (2, 4))),
    "fishnet150": ((2, 4, 8), 4, ((2, 2), (2, 2), (2, 2)), ((2, 2), (2, 2), (4, 4))),
    "fishnet201": ((3, 4, 12), 4, ((2, 2), (2, 2), (2, 2)), ((2, 2), (3, 2), (10, 9))),
}


def halve(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2), rounded up: the largest of each 2 x 2."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def double(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size): each value four times, cut where `halve` rounded up."""
    return F.interpolate(x, scale_factor=2.0)[..., : size[0], : size[1]]


class ReduceChannels(nn.Module):
    """(B, kC, H, W) -> (B, C, H, W): adds each k neighbouring channels."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.k)).sum(2)


class PreAct(nn.Module):
    """Batch norm, ReLU, then a convolution that keeps the size."""

    def __init__(
        self, channels: int, out: int, size: int = 1, rate: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        padding = rate * (size // 2)
        self.conv = nn.Conv2d(channels, out, size, 1, padding, rate, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(x), inplace=True))


class Bottleneck(nn.Module):
    """(B, C, H, W) -> (B, D, H, W); `reduces`: the shortcut of C = kD channels adds them by k."""

    def __init__(
        self, channels: int, out: int, rate: int = 1, reduces: bool = False
    ) -> None:
        super().__init__()
        width = out // 4
        self.residual = nn.Sequential(
            PreAct(channels, width), PreAct(width, width, 3, rate), PreAct(width, out)
        )
        self.shortcut: nn.Module = nn.Identity()
        if reduces:
            self.shortcut = ReduceChannels(channels // out)
        elif channels != out:
            self.shortcut = PreAct(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class Bottlenecks(nn.Sequential):
    """`depth` bottlenecks; the first brings `channels` to `out`."""

    def __init__(
        self, channels: int, out: int, depth: int, rate: int = 1, reduces: bool = False
    ) -> None:
        more = [Bottleneck(out, out, rate) for _ in range(depth - 1)]
        super().__init__(Bottleneck(channels, out, rate, reduces), *more)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Bridge(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): refined, and gated as in SENet (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.squeeze = PreAct(channels, channels // 2)
        self.expand = PreAct(channels // 2, 2 * channels, bias=True)
        self.refine = Bottlenecks(2 * channels, channels, depth)
        self.gate = nn.Sequential(
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(2 * channels, channels // 16, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 16, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.squeeze(x))
        gate = self.gate(x)
        return self.refine(x) * gate + gate


class URBlock(nn.Module):
    """Up-sampling and refinement: (B, C, H/2, W/2) and (B, S, H, W) -> (B, D + S, H, W)."""

    def __init__(
        self, channels: int, out: int, side: int, depths: tuple[int, int], rate: int
    ) -> None:
        super().__init__()
        self.refine = Bottlenecks(channels, out, depths[0], rate, reduces=True)
        self.transfer = Bottlenecks(side, side, depths[1])

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        x = double(self.refine(x), side.shape[-2:])
        return torch.cat([x, self.transfer(side)], dim=1)


class DRBlock(nn.Module):
    """Down-sampling and refinement: (B, C, 2H, 2W) and (B, S, H, W) -> (B, C + S, H, W)."""

    def __init__(self, channels: int, side: int, depths: tuple[int, int]) -> None:
        super().__init__()
        self.refine = Bottlenecks(channels, channels, depths[0])
        self.transfer = Bottlenecks(side, side, depths[1])

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return torch.cat([halve(self.refine(x)), self.transfer(side)], dim=1)


class FishNet(nn.Module):
    """Of any input size: sides that 32 does not divide give maps rounded up, as a ResNet's.

    tail, bridge, body, head: as in DEPTHS; widths: of the stem and the tail; body_widths: of
    what the body refines, each a divisor of what comes in.
    """

    def __init__(
        self,
        tail: Sequence[int],
        bridge: int,
        body: Sequence[tuple[int, int]],
        head: Sequence[tuple[int, int]],
        widths: Sequence[int] = (64, 128, 256, 512),
        body_widths: Sequence[int] = (512, 384, 256),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(in_chans, widths[0] // 2, stride=2),
            *_conv_norm_relu(widths[0] // 2, widths[0] // 2),
            *_conv_norm_relu(widths[0] // 2, widths[0]),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.tail, self.body, self.head = (nn.ModuleList() for _ in range(3))
        for channels, out, depth in zip(widths, widths[1:], tail, strict=False):
            self.tail.append(Bottlenecks(channels, out, depth))
        self.bridge = Bridge(widths[-1], bridge)
        up = [widths[-1]]  # channels of the body, from stride 32 to 4
        for i, (out, side) in enumerate(zip(body_widths, widths[-2::-1], strict=True)):
            self.body.append(URBlock(up[-1], out, side, body[i], rate=2**i))
            up.append(out + side)
        down = [up[-1]]  # from stride 4 to 32
        for depths, side in zip(head, up[-2::-1], strict=True):
            self.head.append(DRBlock(down[-1], side, depths))
            down.append(down[-1] + side)

        self.stage_channels, self.num_features = down, down[-1]
        modules = ["body.2", "head.0", "head.1", "head.2"]
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": module}
            for i, (channels, module) in enumerate(zip(down, modules, strict=True))
        ]
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """(B, stage_channels[i], H / s, W / s) at strides s = 4, 8, 16, 32: body's end, head."""
        tail = [self.stem(x)]
        for stage in self.tail:
            tail.append(halve(stage(tail[-1])))
        body = [self.bridge(tail[-1])]
        for stage, side in zip(self.body, tail[-2::-1], strict=True):
            body.append(stage(body[-1], side))
        head = [body[-1]]
        for stage, side in zip(self.head, body[-2::-1], strict=True):
            head.append(stage(head[-1], side))
        return head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage_maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.classifier(self.score(x), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier.fc

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Without classes the score layers go too: the head's maps are pooled as they are."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes, channels = num_classes, self.num_features
        self.score: nn.Module = nn.Identity()
        if num_classes:
            halved = PreAct(channels, channels // 2)
            channels = channels // 2
            relu = nn.ReLU(inplace=True)
            self.score = nn.Sequential(halved, nn.BatchNorm2d(channels), relu)
        self.head_hidden_size = channels
        self.classifier = ClassifierHead(
            channels, num_classes, self.global_pool, self.drop_rate
        )
        for part in (self.score, self.classifier):
            part.to(self.stem[0].weight).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the input of each bottleneck for the backward pass."""
        for module in self.modules():
            if isinstance(module, Bottlenecks):
                module.grad_checkpointing = enable


def _conv_norm_relu(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


# timm's registry

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0",
            "classifier": "classifier.fc",
        }
        for name in DEPTHS
    }
)


def _build(name: str, pretrained: bool, **options: Any) -> FishNet:
    maps = {"feature_cls": "fx", "out_indices": (0, 1, 2, 3)}
    options = dict(zip(PARTS, DEPTHS[name], strict=True)) | options
    return build_model_with_cfg(FishNet, name, pretrained, feature_cfg=maps, **options)


@register_model
def fishnet99(pretrained: bool = False, **options: Any) -> FishNet:
    return _build("fishnet99", pretrained, **options)


@register_model
def fishnet150(pretrained: bool = False, **options: Any) -> FishNet:
    return _build("fishnet150", pretrained, **options)


@register_model
def fishnet201(pretrained: bool = False, **options: Any) -> FishNet:
    return _build("fishnet201", pretrained, **options)


# Checkpoints of github.com/kevin-ssy/FishNet: theirs -> ours

_MODULES = {
    "conv1.0": "stem.0",
    "conv1.1": "stem.1",
    "conv2.0": "stem.3",
    "conv2.1": "stem.4",
    "conv3.0": "stem.6",
    "conv3.1": "stem.7",
    "fish.fish.3.0.0": "bridge.squeeze.norm",
    "fish.fish.3.0.2": "bridge.squeeze.conv",
    "fish.fish.3.0.3": "bridge.expand.norm",
    "fish.fish.3.1": "bridge.expand.conv",
    "fish.fish.3.1.0": "bridge.squeeze.conv",  # from here as in the "welltrained" files
    "fish.fish.3.1.1": "bridge.expand.norm",
    "fish.fish.3.1.3": "bridge.expand.conv",
    "fish.fish.3.3.0.0": "bridge.gate.0",
    "fish.fish.3.3.0.3": "bridge.gate.3",
    "fish.fish.3.3.0.5": "bridge.gate.5",
}
_STAGES = {  # in a key, the number of the bottleneck follows
    "0.0": "tail.0",
    "1.0": "tail.1",
    "2.0": "tail.2",
    "3.2": "bridge.refine",
    **{f"{4 + i}.0": f"body.{i}.refine" for i in range(3)},
    **{f"{4 + i}.1": f"body.{i}.transfer" for i in range(3)},
    **{f"{7 + i}.0": f"head.{i}.refine" for i in range(3)},
    **{f"{7 + i}.1": f"head.{i}.transfer" for i in range(3)},
}
_LAYERS = {  # of a bottleneck
    **{f"bn{i + 1}": f"residual.{i}.norm" for i in range(3)},
    **{f"conv{i + 1}": f"residual.{i}.conv" for i in range(3)},
    "shortcut.0": "shortcut.norm",
    "shortcut.2": "shortcut.conv",
    "shortcut": "shortcut.conv",  # FishNet-201's first: a convolution without a norm
}
_CLASSIFIER = ("fish.fish.9.2.", "fish.fish.9.3.", "fish.fish.9.4.")


def is_release(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a released checkpoint."""
    return any(key.removeprefix("module.").startswith("fish.fish.") for key in keys)


def from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released checkpoint under the keys of FishNet without classes; unknown keys stay.

    The files are older than the batch counts of norms, which get zeros. The shortcut without a
    norm gets a fresh one: what it meets is never negative and passes.
    """
    ours = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if not key.startswith(_CLASSIFIER):
            module, dot, name = key.rpartition(".")
            ours[_our_module(module) + dot + name] = value
    first = "tail.0.0.shortcut"
    if f"{first}.conv.weight" in ours and f"{first}.norm.weight" not in ours:
        fresh = nn.BatchNorm2d(ours[f"{first}.conv.weight"].shape[1]).state_dict()
        ours |= {f"{first}.norm.{name}": value for name, value in fresh.items()}
    for key in list(ours):
        if key.endswith(".running_var"):
            count = key.removesuffix("running_var") + "num_batches_tracked"
            ours.setdefault(count, torch.tensor(0))
    return ours


def _our_module(theirs: str) -> str:
    block = re.fullmatch(r"fish\.fish\.(\d\.\d)\.(\d+)\.([a-z0-9.]+)", theirs)
    if block and block[1] in _STAGES and block[3] in _LAYERS:
        return f"{_STAGES[block[1]]}.{block[2]}.{_LAYERS[block[3]]}"
    return _MODULES.get(theirs, theirs)
