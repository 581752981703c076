"""The networks of the released weights, typed again from their definitions: layers by hand, and
nothing of timm's. Every weight has the name that the release gave it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict):
    """A state dict that a network fills, at random, as it asks for its layers."""

    def __init__(self, seed=0):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, name, shape, mean=0.0, spread=1.0, lowest=-math.inf):
        if name not in self:
            drawn = torch.randn(shape, generator=self.random, device="cpu")
            drawn = (drawn * spread + mean).clamp(min=lowest)
            self[name] = drawn.to(torch.get_default_device())
        assert self[name].shape == shape, name
        return self[name]

    def convolve(self, x, name, out, size, stride=1, dilation=1, groups=1, bias=False):
        """Zero padding that keeps the map's sides at stride 1."""
        shape = torch.Size((out, x.shape[1] // groups, size, size))
        kernel = self.draw(f"{name}.weight", shape, spread=shape[1:].numel() ** -0.5)
        bias = self.draw(f"{name}.bias", shape[:1], spread=0.3) if bias else None
        padding = dilation * (size - 1) // 2
        return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)

    def linear(self, x, name, out, bias=False):
        shape = torch.Size((out, x.shape[1]))
        weight = self.draw(f"{name}.weight", shape, spread=shape[1] ** -0.5)
        bias = self.draw(f"{name}.bias", shape[:1], spread=0.3) if bias else 0
        return x @ weight.T + bias

    def affine(self, x, name):
        size = x.shape[1:2]
        scale = self.draw(f"{name}.weight", size, 1, 0.3, lowest=0.2)
        return (
            scale[:, None, None] * x
            + self.draw(f"{name}.bias", size, 0, 0.3)[:, None, None]
        )

    def batch_norm(self, x, name, counted=True):
        size = x.shape[1:2]
        mean = self.draw(f"{name}.running_mean", size, 0, 0.3)
        variance = self.draw(f"{name}.running_var", size, 1, 0.4, lowest=0.3)
        if counted:
            self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return self.affine(x, name)

    def instance_norm(self, x, name):
        mean = x.mean((2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((2, 3), keepdim=True)
        return self.affine((x - mean) / (variance + 1e-5).sqrt(), name)


def ibn_net(
    w: Weights,
    x: Tensor,
    layers: tuple[int, ...],
    planes: tuple[int, ...] = (64, 128, 256, 512),
    groups: int = 1,
    base_width: int = 64,
    se: bool = False,
    last_stride: int = 2,
) -> Tensor:
    """IBN-Net's resnet*_ibn_a, resnext*_ibn_a (groups, base_width) and se_resnet*_ibn_a (se)."""
    x = w.convolve(x, "conv1", 64, 7, stride=2)
    x = F.max_pool2d(w.batch_norm(x, "bn1").relu(), 3, 2, padding=1)
    for stage, strides in enumerate((1, 2, 2, last_stride)):
        width = math.floor(planes[stage] * (base_width / 64)) * groups
        for i in range(layers[stage]):
            name, stride = f"layer{stage + 1}.{i}", strides if i == 0 else 1
            y = w.convolve(x, f"{name}.conv1", width, 1)
            if stage < 3:
                half = int(width * 0.5)
                first = w.instance_norm(y[:, :half], f"{name}.bn1.IN")
                y = torch.cat((first, w.batch_norm(y[:, half:], f"{name}.bn1.BN")), 1)
            else:
                y = w.batch_norm(y, f"{name}.bn1")
            y = w.convolve(y.relu(), f"{name}.conv2", width, 3, stride, groups=groups)
            y = w.batch_norm(y, f"{name}.bn2").relu()
            y = w.convolve(y, f"{name}.conv3", 4 * planes[stage], 1)
            y = w.batch_norm(y, f"{name}.bn3")
            if se:
                gate = w.linear(y.mean((2, 3)), f"{name}.se.fc.0", y.shape[1] // 16)
                gate = w.linear(gate.relu(), f"{name}.se.fc.2", y.shape[1])
                y = y * gate.sigmoid()[:, :, None, None]
            if i == 0:
                x = w.convolve(x, f"{name}.downsample.0", y.shape[1], 1, stride)
                x = w.batch_norm(x, f"{name}.downsample.1")
            x = (x + y).relu()
    w.linear(x.mean((2, 3)), "fc", 5, bias=True)
    return x


def pooled_resnet(
    w: Weights, x: Tensor, layers: tuple[int, ...], last_stride: int = 2
) -> Tensor:
    """The plain ResNet of 2021: torchvision's names, its bottlenecks of PyTorch before 0.4.1 (no
    counters), and an average pooling in place of the stride of each projection."""
    x = w.convolve(x, "conv1", 64, 7, stride=2)
    x = F.max_pool2d(w.batch_norm(x, "bn1", counted=False).relu(), 3, 2, padding=1)
    for stage, strides in enumerate((1, 2, 2, last_stride)):
        planes = 64 * 2**stage
        for i in range(layers[stage]):
            name, stride, y = f"layer{stage + 1}.{i}", strides if i == 0 else 1, x
            for conv, (out, size) in enumerate(((planes, 1), (planes, 3)), start=1):
                y = w.convolve(
                    y, f"{name}.conv{conv}", out, size, stride if size == 3 else 1
                )
                y = w.batch_norm(y, f"{name}.bn{conv}", counted=False).relu()
            y = w.convolve(y, f"{name}.conv3", 4 * planes, 1)
            y = w.batch_norm(y, f"{name}.bn3", counted=False)
            if i == 0:
                if stride > 1:
                    x = F.avg_pool2d(x, stride, stride)
                x = w.convolve(x, f"{name}.downsample.0", 4 * planes, 1)
                x = w.batch_norm(x, f"{name}.downsample.1", counted=False)
            x = (x + y).relu()
    w.linear(x.mean((2, 3)), "fc", 5, bias=True)
    return x


def resnest(
    w: Weights,
    x: Tensor,
    layers: tuple[int, ...],
    planes: tuple[int, ...] = (64, 128, 256, 512),
    stem: int = 64,
    last_stride: int = 2,
) -> Tensor:
    """ResNeSt, radix 2; with last_stride 1 as released for `dilation=2`."""
    for place, norm, out in ((0, "conv1.1", 1), (3, "conv1.4", 1), (6, "bn1", 2)):
        stride = 2 if place == 0 else 1
        x = w.convolve(x, f"conv1.{place}", out * stem, 3, stride)
        x = w.batch_norm(x, norm).relu()
    x = F.max_pool2d(x, 3, 2, padding=1)
    for stage, strides in enumerate((1, 2, 2, last_stride)):
        width = planes[stage]
        for i in range(layers[stage]):
            name, stride = f"layer{stage + 1}.{i}", strides if i == 0 else 1
            dilation = 2 if stage == 3 and last_stride == 1 and i > 0 else 1
            y = w.convolve(x, f"{name}.conv1", width, 1)
            y = w.batch_norm(y, f"{name}.bn1").relu()
            y = split_attention(w, y, f"{name}.conv2", dilation)
            if i == 0 and stage > 0:  # at stride 1 too
                y = F.avg_pool2d(y, 3, stride, padding=1)
            y = w.batch_norm(
                w.convolve(y, f"{name}.conv3", 4 * width, 1), f"{name}.bn3"
            )
            if i == 0:
                x = F.avg_pool2d(
                    x, stride, stride, ceil_mode=True, count_include_pad=False
                )
                x = w.convolve(x, f"{name}.downsample.1", 4 * width, 1)
                x = w.batch_norm(x, f"{name}.downsample.2")
            x = (x + y).relu()
    w.linear(x.mean((2, 3)), "fc", 5, bias=True)
    return x


def split_attention(w: Weights, x: Tensor, name: str, dilation: int) -> Tensor:
    """Two splits of the channels, weighted by a softmax over the two (Zhang et al., 2020)."""
    width = x.shape[1]
    y = w.convolve(x, f"{name}.conv", 2 * width, 3, dilation=dilation, groups=2)
    splits = w.batch_norm(y, f"{name}.bn0").relu().chunk(2, dim=1)
    gap = (splits[0] + splits[1]).mean((2, 3), keepdim=True)
    gap = w.convolve(gap, f"{name}.fc1", max(width * 2 // 4, 32), 1, bias=True)
    gap = w.batch_norm(gap, f"{name}.bn1").relu()
    one, two = w.convolve(gap, f"{name}.fc2", 2 * width, 1, bias=True).chunk(2, dim=1)
    share = (one - two).sigmoid()  # the softmax of two
    return share * splits[0] + (1 - share) * splits[1]


def se_resnext(w: Weights, x: Tensor, layers: tuple[int, ...]) -> Tensor:
    """pretrainedmodels' se_resnext*_32x4d."""
    x = w.batch_norm(w.convolve(x, "layer0.conv1", 64, 7, 2), "layer0.bn1")
    x = F.max_pool2d(x.relu(), 3, 2, ceil_mode=True)
    for stage, strides in enumerate((1, 2, 2, 2)):
        planes = 64 * 2**stage
        for i in range(layers[stage]):
            name, stride = f"layer{stage + 1}.{i}", strides if i == 0 else 1
            y = w.convolve(x, f"{name}.conv1", 2 * planes, 1)
            y = w.batch_norm(y, f"{name}.bn1").relu()
            y = w.convolve(y, f"{name}.conv2", 2 * planes, 3, stride, groups=32)
            y = w.batch_norm(y, f"{name}.bn2").relu()
            y = w.convolve(y, f"{name}.conv3", 4 * planes, 1)
            y = w.batch_norm(y, f"{name}.bn3")
            gate, se = y.mean((2, 3), keepdim=True), f"{name}.se_module"
            gate = w.convolve(gate, f"{se}.fc1", planes // 4, 1, bias=True).relu()
            gate = w.convolve(gate, f"{se}.fc2", 4 * planes, 1, bias=True)
            if i == 0:
                x = w.convolve(x, f"{name}.downsample.0", 4 * planes, 1, stride)
                x = w.batch_norm(x, f"{name}.downsample.1")
            x = (x + gate.sigmoid() * y).relu()
    w.linear(x.mean((2, 3)), "last_linear", 5, bias=True)
    return x


# EfficientNet-lite0: kernel, stride, expansion, channels of each block (Tan & Le, ICML 2019)
LITE0_BLOCKS = [
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)],
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    (3, 1, 6, 320),
]


def lite0(weights: dict[str, Tensor], x: Tensor, last_stride: int = 2) -> Tensor:
    """lite0's feature map, with the package's names; last_stride: of the last strided stage."""

    def convolve(x, name, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        for side in (-1, -2):  # TensorFlow's SAME: an odd pixel is added at the end
            size, k = x.shape[side], kernel.shape[side]
            total = max((-(-size // stride) - 1) * stride + k - size, 0)
            ends = (total // 2, total - total // 2)
            x = F.pad(x, ends if side == -1 else (0, 0, *ends))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(x, name):
        mean, variance, weight, bias = (
            weights[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    x = F.relu6(norm(convolve(x, "_conv_stem", 2), "_bn0"))
    for number, (_, stride, expansion, channels) in enumerate(LITE0_BLOCKS):
        name, before = f"_blocks.{number}", x
        if (stride, channels) == (2, 192):
            stride = last_stride
        if expansion > 1:
            x = F.relu6(norm(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = convolve(x, f"{name}._depthwise_conv", stride, x.shape[1])
        x = F.relu6(norm(x, f"{name}._bn1"))
        x = norm(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
        assert x.shape[1] == channels
        if before.shape == x.shape:
            x = x + before
    return F.relu6(norm(convolve(x, "_conv_head"), "_bn1"))
