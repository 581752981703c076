"""Backbones by name, from timm or a preset: images (B, 3, H, W) -> maps (B, C, h, w)."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.layers import DropPath
from timm.models.efficientnet import EfficientNet
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import ResNet
from torch import Tensor, nn

from kit.data.inputs import InputSpec
from kit.models import fishnet, ibn


@dataclass(frozen=True)
class Preset:
    """A network of the two systems, told as what timm has to build."""

    timm: str  # timm's name
    options: Mapping[str, Any] = field(default_factory=dict)  # of timm.create_model
    ibn: bool = False  # IBN-a in layers 1 to 3
    weights: tuple[str, ...] = ("timm",)  # families of kit.models.weights that fill it


PRESETS = {
    # 2nd place of Google Landmark Retrieval 2021; its plain ResNet pools where it downsamples
    "resnet50": Preset("resnet50", {"avg_down": True}, weights=("timm", "torchvision")),
    "resnet101_ibn_a": Preset("resnet101", ibn=True, weights=("ibn",)),
    "seresnet101": Preset("seresnet101"),
    "seresnet101_ibn_a": Preset("seresnet101", ibn=True, weights=("ibn",)),
    "resnext101_32x4d": Preset("resnext101_32x4d"),
    "resnext101_ibn_a": Preset("resnext101_32x4d", ibn=True, weights=("ibn",)),
    "resnest101e": Preset("resnest101e", weights=("timm", "resnest")),
    "resnest269e": Preset("resnest269e", weights=("timm", "resnest")),
    "tf_efficientnet_b5": Preset("tf_efficientnet_b5"),
    "tf_efficientnet_b7": Preset("tf_efficientnet_b7"),
    # 1st place of Google Landmark Retrieval 2019
    "resnet101": Preset("resnet101", weights=("timm", "torchvision")),
    "legacy_seresnext101_32x4d": Preset(
        "legacy_seresnext101_32x4d", weights=("timm", "pretrainedmodels")
    ),
    **{name: Preset(name, weights=("fishnet",)) for name in fishnet.DEPTHS},
}

# what timm may have between forward_features and its classifier
HEADS = ("fc_norm", "conv_head", "norm_head", "pre_logits")


def create(
    name: str, *, stride: int = 0, drop_path: float = 0.0, size: int = 0
) -> nn.Module:
    """A network of random weights without its classifier: `maps` is the way through it.

    name: of PRESETS, or any that timm knows (with a tag, as "resnet50.tv_in1k", it is timm's own
    where a preset has the name); stride: of the last map, 16 as the 2021 system has it, 0 as the
    network comes; drop_path: stochastic depth of the last block; size: side of the images, for
    networks that must know it. ViTs need not: they interpolate their position embeddings, which
    keep their shape.
    """
    preset = PRESETS.get(name) or Preset(_known(name))
    if stride not in (0, 16):
        raise ValueError(f"stride {stride} is not one of 0 (as the network comes), 16")
    backbone = _from_timm(name, preset, size, drop_path)
    if preset.ibn:
        ibn.convert(backbone)
    if stride:
        set_stride_16(backbone, name)
    return backbone


def input_spec(name: str) -> InputSpec:
    """What timm's release of a backbone was trained with: size of the square, mean, deviation."""
    preset = PRESETS.get(name) or Preset(_known(name))
    about = timm.models.get_pretrained_cfg(preset.timm)
    return InputSpec(about.input_size[-1], mean=about.mean, std=about.std)


def maps(backbone: nn.Module, x: Tensor, stages: int = 1) -> list[Tensor]:
    """(B, C, h, w) at the end of each of the last `stages` stages; images x: (B, 3, H, W).

    The last map is what forward_features gives. Of token networks: patch tokens on their grid,
    and each block of a ViT is a stage.
    """
    if stages == 1:
        return [_as_map(backbone, backbone.forward_features(x), x)]
    channels(backbone, stages)  # refuses what is not there
    if hasattr(backbone, "stage_maps"):
        return backbone.stage_maps(x)[-stages:]
    last, found = backbone.forward_intermediates(x, indices=stages)
    return [*found[:-1], _as_map(backbone, last, x)]


def channels(backbone: nn.Module, stages: int = 1) -> list[int]:
    """C of each of `maps(backbone, x, stages)`."""
    known = [stage["num_chs"] for stage in backbone.feature_info]
    if not 1 <= stages <= len(known):
        raise ValueError(f"stages {stages} is not in 1 to {len(known)}, all there are")
    return [*known[-stages:-1], backbone.num_features]


def set_stride_16(backbone: nn.Module, name: str = "this network") -> None:
    """Halves the stride of a timm network's last map from 32, in place, as the 2021 system did.

    ResNets and EfficientNets lose a stride and nothing else; ResNeSt, as released, also dilates
    what follows. timm's output_stride=16 is another network: it dilates ResNets, and takes a
    pooling out of ResNeSt.
    """
    known = isinstance(backbone, (ResNet, EfficientNet))
    if not known or backbone.feature_info[-1]["reduction"] != 32:
        raise ValueError(
            f"stride 16: {name} has no such form, only ResNets, ResNeSts and EfficientNets of "
            "stride 32 have; use stride 0"
        )
    if isinstance(backbone, ResNet):
        first, *others = backbone.layer4
        if isinstance(first, ResNestBottleneck):
            _dilate(first, others)
        _unstride(first, name)
    else:
        strided = [stage[0] for stage in backbone.blocks if _has_stride(stage[0])]
        _unstride(strided[-1], name)
    for stage in backbone.feature_info:
        stage["reduction"] = min(stage["reduction"], 16)


def _known(name: str) -> str:
    if timm.is_model(name):
        return name
    close = difflib.get_close_matches(name, [*PRESETS, *timm.list_models()], n=3)
    raise ValueError(
        f"backbone {name!r} is not one of timm's"
        + (f"; close: {', '.join(dict.fromkeys(close))}" if close else "")
        + f"; presets: {', '.join(PRESETS)}"
    )


def _from_timm(name: str, preset: Preset, size: int, drop_path: float) -> nn.Module:
    """timm's network for this size and drop path, without head."""
    about = timm.models.get_pretrained_cfg(preset.timm)
    options = {**preset.options, "num_classes": 0}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    sizes: list[dict[str, Any]] = [{}]
    if about.fixed_input_size and size:
        sizes = [{"img_size": size}, *sizes]
    if about.fixed_input_size:
        sizes = [{"dynamic_img_size": True}, *sizes]
    try:
        backbone = _first_accepted(preset.timm, options | {"global_pool": ""}, sizes)
    except AssertionError:  # distilled networks and some others pool in one way only
        backbone = _first_accepted(preset.timm, options, sizes)
    _check_patches(name, backbone, size)
    _check_drop_path(name, backbone, drop_path)
    _remove_head(backbone, str(about.classifier))
    return backbone


def _first_accepted(
    name: str, options: Mapping[str, Any], sizes: list[dict[str, Any]]
) -> nn.Module:
    """timm's network with the first of `sizes` whose options it knows; the last has none."""
    at, *others = sizes
    try:
        return timm.create_model(name, **options, **at)
    except TypeError as error:
        if "'drop_path_rate'" in str(error):
            raise _no_drop_path(name) from None
        if not others:
            raise
    return _first_accepted(name, options, others)


def _no_drop_path(name: str) -> ValueError:
    return ValueError(f"{name} has no drop path: set drop_path to 0")


def _remove_head(backbone: nn.Module, classifier: str) -> None:
    """What timm keeps between forward_features and a classifier would never get a gradient, and
    distributed training stops at such parameters."""
    heads = HEADS
    if isinstance(backbone, EfficientNet):  # its features end in its conv_head
        heads = ()
    if classifier.startswith("head."):
        heads = (*heads, "head")
    for name in heads:
        if hasattr(backbone, name):
            setattr(backbone, name, nn.Identity())


def _check_patches(name: str, backbone: nn.Module, size: int) -> None:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if not size or not patch:
        return
    side = patch[0] if isinstance(patch, tuple) else patch
    if size % side:
        raise ValueError(
            f"size {size} is not a multiple of {name}'s patches of {side} pixels: "
            f"use {size // side * side} or {size // side * side + side}"
        )


def _check_drop_path(name: str, backbone: nn.Module, drop_path: float) -> None:
    """Refuses where nothing would be dropped, or, as in timm's ResNeSt, the shortcut would."""
    parts = list(backbone.modules())
    dropping = any(isinstance(part, DropPath) and part.drop_prob for part in parts)
    astray = any(isinstance(part, ResNestBottleneck) for part in parts)
    if drop_path and (astray or not dropping):
        raise _no_drop_path(name)


def _unstride(block: nn.Module, name: str) -> None:
    """Takes the stride out of a block, in place; average pooling before a projection goes."""
    blur = getattr(block, "aa", None)
    if blur and not isinstance(blur, nn.Identity):
        raise ValueError(
            f"stride 16: {name} blurs where it strides, and has no such form; use stride 0"
        )
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            part.stride = (1, 1)
    shortcut = getattr(block, "downsample", None)
    if shortcut is not None and isinstance(shortcut[0], nn.AvgPool2d):
        shortcut[0] = nn.Identity()


def _dilate(first: nn.Module, others: list[nn.Module]) -> None:
    """The last stage of ResNeSt: the first block pools without stride, the others dilate by 2."""
    for pool in (first.avd_first, first.avd_last):
        if pool is not None:
            pool.stride = 1
    for block in others:
        conv = getattr(block.conv2, "conv", block.conv2)  # without splits it is bare
        conv.dilation = conv.padding = (2, 2)


def _has_stride(block: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride != (1, 1) for m in block.modules())


def _as_map(backbone: nn.Module, y: Any, x: Tensor) -> Tensor:
    """What forward_features gives for images x, as (B, C, h, w)."""
    shape = tuple(getattr(y, "shape", ()))
    if len(shape) == 4:
        nhwc = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        return y.permute(0, 3, 1, 2) if nhwc else y
    if len(shape) == 3:
        patches = y[:, getattr(backbone, "num_prefix_tokens", 0) :]
        height, width = x.shape[-2:]
        side = (height * width / patches.shape[1]) ** 0.5  # of a patch
        grid = round(height / side), round(width / side)
        if grid[0] * grid[1] == patches.shape[1]:
            return patches.transpose(1, 2).unflatten(2, grid)
    raise ValueError(
        f"{type(backbone).__name__} gives {shape or 'several things'} for images "
        f"{tuple(x.shape)}, which is no map of them: choose another backbone"
    )
