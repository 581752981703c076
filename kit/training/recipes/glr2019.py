"""1st place of Google Landmark Retrieval 2019: GLD-v1 first, then the cleaned GLDv2 list.

The classifier is not handed over, since the classes are others. Six members of the ensemble
(`v19c` ... `v24c`), the network that cleaned (`v7`), and the networks of the published ablations.
The last epoch of some is another stage: the same cosine's tail, at a larger size, with all batch
norms frozen; its momentum starts at zero, ten steps of an epoch's tens of thousands.
"""

from dataclasses import replace

from kit.data.augment import MIDDLE, SOFT, Augment
from kit.data.inputs import InputSpec
from kit.data.templates import square_side
from kit.losses.heads import Head
from kit.models.net import NetConfig
from kit.training.job import Stage
from kit.training.optim import Optim
from kit.training.recipes.recipe import Recipe

RELEASED = {
    "resnet101": "resnet101-5d3b4d8f.pth",
    "legacy_seresnext101_32x4d": "se_resnext101_32x4d-3b2fe3d8.pth",
    "fishnet150": "fishnet150_ckpt_welltrained.tar",
}
ARCFACE, COSFACE = Head("arcface"), Head("cosface")


def _net(backbone: str) -> NetConfig:
    """GeM (of four stages in FishNet), a linear layer with a bias, batch norm with one."""
    return NetConfig(
        backbone,
        RELEASED[backbone],
        pool="G,G,G,G" if backbone == "fishnet150" else "G",
        neck_bias=True,
        neck_norm_bias=True,
        neck_init="normal",
        input=InputSpec(),
    )


def _optim(floor: float = 3e-3) -> Optim:
    """One group for everything; the cosine ends at 3e-6."""
    return Optim(
        lr=1e-3, weight_decay=1e-5, norm_decay=1e-5, bias_decay=1e-5, floor=floor
    )


def _stage(
    images: str,
    template: str,
    epochs: int,
    augment: Augment = SOFT,
    head: Head = ARCFACE,
    batch: int = 32,
) -> Stage:
    return Stage(
        images,
        images=images,
        size=square_side(template),
        template=template,
        epochs=epochs,
        batch=batch,
        keep_head=False,
        optim=_optim(),
        head=head,
        augment=augment,
    )


def _after(stage: Stage, earlier: Stage) -> Stage:
    return replace(stage, init=earlier.name)


def _tail(stage: Stage, template: str) -> tuple[Stage, Stage]:
    """`stage` without its last epoch, and that epoch at a larger size."""
    most = replace(stage, stop=stage.epochs - 1)
    tail = replace(
        stage,
        name="tail",
        start=most.stop,
        template=template,
        size=square_side(template),
        init=stage.name,
        keep_head=True,
        frozen_norms=True,
    )
    return most, tail


def _recipe(
    name: str, backbone: str, *stages: Stage, clean: str = "", trainable: bool = False
) -> Recipe:
    net = replace(_net(backbone), pool_trainable=trainable)
    return Recipe(f"glr2019/{name}", net, stages, clean, rerank=("sort_insert",))


def _v1only() -> Recipe:
    return _recipe("v1only", "resnet101", _stage("gld_v1", "S2", 5), trainable=True)


def _members() -> tuple[Recipe, ...]:
    """v19c, v22c on the less strict cleaning; v20c, v24c end after 6 of 7 epochs."""
    frequency_2 = "30 inliers with at least 2 neighbours"
    first = _stage("gld_v1", "S", 5, head=COSFACE)
    clean = _after(_stage("clean", "S2", 5, head=COSFACE), first)
    v19c = _recipe("v19c", "fishnet150", first, *_tail(clean, "M2"), clean=frequency_2)

    first = _stage("gld_v1", "S", 7, MIDDLE)
    clean = _after(_stage("clean", "SS2", 7, MIDDLE), first)
    v20c = _recipe("v20c", "legacy_seresnext101_32x4d", first, replace(clean, stop=6))
    v21c = _recipe("v21c", "resnet101", first, *_tail(clean, "SM2"))

    first = _stage("gld_v1", "S2", 5, head=replace(ARCFACE, margin=0.4))
    clean = _after(_stage("clean", "S2", 5), first)
    v22c = _recipe("v22c", "fishnet150", first, *_tail(clean, "M2"), clean=frequency_2)

    first = _stage("gld_v1", "SS2", 5)
    clean = _after(_stage("clean", "S2", 7, MIDDLE), first)
    v23c = _recipe("v23c", "fishnet150", first, *_tail(clean, "SM2"))

    first = _stage("gld_v1", "SS2", 5, head=COSFACE, batch=64)
    clean = _after(_stage("clean", "SS2", 7, MIDDLE, COSFACE), first)
    v24c = _recipe("v24c", "legacy_seresnext101_32x4d", first, replace(clean, stop=6))
    return v19c, v20c, v21c, v22c, v23c, v24c


def _others() -> tuple[Recipe, ...]:
    """The network that found what to clean, and those of the ablations of data."""
    first = _stage("gld_v1", "S2", 5)
    cleaner = replace(
        _stage("gld_v1", "S", 5),
        optim=_optim(floor=1e-3),
        augment=replace(SOFT, flip=0.5, crop_scale=0.1),
    )
    return (
        replace(_recipe("v7", "fishnet150", cleaner), gld_v1_classes=14_938),
        _v1only(),
        _recipe("v2clean", "resnet101", first, _after(_stage("clean", "S2", 5), first)),
        _recipe("v2noisy", "resnet101", first, _after(_stage("full", "SS2", 5), first)),
        _recipe("v2clean_only", "resnet101", _stage("clean", "S2", 5)),
    )


def _lite0() -> Recipe:
    """The whole schedule in minutes on two CPU cores; the noisy list stands for GLD-v1."""
    half = (0.5, 0.5, 0.5)
    first = replace(_stage("full", "S2", 2), size=192)
    clean = replace(_after(_stage("clean", "S2", 5), first), size=192)
    stages = []
    for stage in (first, *_tail(clean, "M2")):
        size = 256 if stage.name == "tail" else 192
        optim = replace(stage.optim, lr=1e-3, optimizer="adamw", weight_decay=0.05)
        stages.append(replace(stage, size=size, eval_size=256, batch=16, optim=optim))
    net = NetConfig(
        "tf_efficientnet_lite0",
        "lite0",
        neck_bias=True,
        neck_norm_bias=True,
        neck_init="normal",
        input=InputSpec(mean=half, std=half),
    )
    return Recipe("glr2019/lite0", net, tuple(stages))


ALL = (*_members(), *_others(), _lite0())
