"""Our own schedules: a small one, a quick one, and what to start from in 2026."""

from dataclasses import replace

from kit.data.augment import Augment
from kit.data.inputs import InputSpec
from kit.losses.heads import Head
from kit.models.net import NetConfig
from kit.training.job import Stage
from kit.training.optim import Optim
from kit.training.recipes.recipe import Recipe


def _toy() -> Recipe:
    """Minutes on two CPU cores: EfficientNet-lite0, clean landmarks, then their noisy images."""
    half = (0.5, 0.5, 0.5)
    clean = Stage(
        "clean",
        images="clean",
        size=192,
        eval_size=224,
        epochs=5,
        batch=16,
        optim=Optim(1e-3, "adamw", weight_decay=5e-2, warmup=0.5, clip=5.0),
        augment=Augment(crop=0.4, jitter=0.3),
    )
    c2x = replace(
        clean,
        name="c2x",
        images="c2x",
        init="clean",
        size=224,
        eval_size=256,
        epochs=3,
        optim=replace(clean.optim, lr=3e-4, warmup=0),
        head=Head(noisy_weight=0.25),
    )
    spec = InputSpec(mean=half, std=half)
    return Recipe(
        "toy", NetConfig("tf_efficientnet_lite0", "lite0", input=spec), (clean, c2x)
    )


def _fast() -> Recipe:
    """One evening: ResNet-50 at 256 pixels on the clean list, from timm's weights."""
    clean = Stage(
        "clean",
        images="clean",
        size=256,
        eval_size=320,
        epochs=6,
        batch=256,
        optim=Optim(2e-2, weight_decay=5e-4, warmup=0.5, clip=5.0),
        augment=Augment(crop=0.4, jitter=0.2),
    )
    return Recipe("fast", NetConfig("resnet50", "timm"), (clean,))


def _modern() -> Recipe:
    """DINOv2 ViT-B with registers: sub-centres, margins by class, rates that fall with depth, growing size."""
    clean = Stage(
        "clean",
        images="clean",
        size=224,
        epochs=8,
        batch=512,
        ema=0.9998,
        optim=Optim(
            2e-4,
            "adamw",
            weight_decay=0.05,
            head_lr=10.0,
            layer_decay=0.8,
            warmup=1,
            clip=1.0,
        ),
        head=Head(centres=3, margin=0.05, rare_margin=0.45),
        augment=Augment(crop=0.3, jitter=0.2, erase=0.25),
    )
    c2x = replace(
        clean,
        name="c2x",
        images="c2x",
        init="clean",
        size=336,
        epochs=3,
        batch=256,
        optim=replace(clean.optim, lr=5e-5, warmup=0),
    )
    full = replace(
        c2x,
        name="full",
        images="full",
        init="c2x",
        size=448,
        epochs=2,
        batch=128,
        optim=replace(c2x.optim, lr=2e-5),
    )
    net = NetConfig("vit_base_patch14_reg4_dinov2", "timm", drop_path=0.1, pool="S")
    return Recipe("modern", net, (clean, c2x, full))


ALL = (_toy(), _fast(), _modern())
