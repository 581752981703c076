"""2nd place of Google Landmark Retrieval 2021: four lists, from clean to all, each from the last.

`glr2021/<backbone>` is what was run, `glr2021_paper/<backbone>` what the paper says of all alike.
Learning rates are those of 8 GPUs together, batches all of them; a stage that handed over a
checkpoint from the middle of its schedule stops there.
"""

from dataclasses import replace

from kit.data.augment import Augment
from kit.data.inputs import InputSpec
from kit.data.samplers import Sampling
from kit.losses.heads import Head
from kit.models.net import NetConfig
from kit.training.job import Stage
from kit.training.optim import Optim
from kit.training.recipes.recipe import Recipe

PADDING = {256: 10, 384: 15, 448: 18, 512: 20}  # pixels on each side, by input side
RELEASED = {  # ImageNet weights that were started from
    "resnet50": "resnet50-19c8e357.pth",
    "seresnet101_ibn_a": "se_resnet101_ibn_a-fabed4e2.pth",
    "resnext101_ibn_a": "resnext101_ibn_a-6ace051d.pth",
    "resnest101e": "resnest101-22405ba7.pth",
    "resnest269e": "resnest269-0cc87c48.pth",
}
INPUT = InputSpec(std=(57 / 255, 57 / 255, 57 / 255))
CONTINENTS = Sampling(order="continent")


def _net(backbone: str) -> NetConfig:
    return NetConfig(backbone, RELEASED[backbone], stride=16, input=INPUT)


def _optim(lr: float, decay: float = 5e-4, warmup: float = 0) -> Optim:
    """Biases at twice the rate; weight decay on everything."""
    return Optim(
        lr=lr,
        weight_decay=decay,
        norm_decay=decay,
        bias_decay=decay,
        bias_lr=2.0,
        warmup=warmup,
    )


def _stage(name: str, size: int, epochs: int, batch: int, optim: Optim) -> Stage:
    return Stage(
        name,
        images=name,
        size=size,
        epochs=epochs,
        batch=batch,
        optim=optim,
        augment=Augment(flip=0.5, pad=PADDING[size], erase=1.0),
    )


def _chain(
    backbone: str,
    size: int,
    batches: tuple[int, int, int, int],
    last_epochs: int,  # of the schedules of full and all
    c2x_stop: int,
    decay: float = 1e-5,  # of full and all
    head: Head | None = None,  # of full and all
) -> Recipe:
    """clean -> c2x at `size`, full -> all at 512."""
    full = _stage("full", 512, last_epochs, batches[2], _optim(8e-4, decay))
    full = replace(full, init="c2x", stop=2 % last_epochs, head=head or Head())
    stages = (
        _stage("clean", size, 10, batches[0], _optim(8e-2, warmup=1)),
        replace(
            _stage("c2x", size, 6, batches[1], _optim(8e-3)),
            init="clean",
            stop=c2x_stop,
        ),
        full,
        replace(
            full,
            name="all",
            images="all",
            batch=batches[3],
            init="full",
            stop=0,
            sampling=CONTINENTS,
        ),
    )
    return Recipe(f"glr2021/{backbone}", _net(backbone), stages)


def _resnet50() -> Recipe:
    """The small network of the ablations, at 256 pixels."""
    clean = _stage("clean", 256, 10, 1024, _optim(8e-2, warmup=1))
    last = replace(
        _stage("all", 256, 2, 1024, _optim(8e-3)), init="clean", sampling=CONTINENTS
    )
    return Recipe("glr2021/resnet50", _net("resnet50"), (clean, last))


def _as_in_the_paper(recipe: Recipe) -> Recipe:
    """One text for every network: 2 epochs at 512, one weight decay, ArcFace throughout."""
    clean, c2x, full, last = recipe.stages
    c2x = replace(c2x, stop=0)
    full = replace(full, epochs=2, stop=0, optim=_optim(8e-4), head=Head())
    last = replace(last, epochs=2, stop=0, optim=_optim(8e-4), head=Head())
    name = recipe.name.replace("glr2021", "glr2021_paper")
    return replace(recipe, name=name, stages=(clean, c2x, full, last))


def _lite0(published: Recipe) -> Recipe:
    """The same four stages in minutes on two CPU cores: a small network, sizes and epochs cut."""
    half = (0.5, 0.5, 0.5)
    cut = {  # side, side at extraction, epochs, learning rate, its factor for the head
        "clean": (160, 192, 4, 1e-3, 1.0),
        "c2x": (160, 192, 2, 3e-4, 1.0),
        # AdamW's steps are small: the rows of new classes would stay where they began
        "full": (224, 256, 2, 3e-4, 10.0),
        # a small list's quota shows few images again and again: gently
        "all": (224, 256, 1, 5e-5, 10.0),
    }
    stages = []
    for stage in published.stages:
        size, eval_size, epochs, lr, head_lr = cut[stage.name]
        optim = Optim(
            lr,
            "adamw",
            weight_decay=0.05,
            head_lr=head_lr,
            warmup=stage.optim.warmup / 2,
        )
        stages.append(
            replace(
                stage,
                size=size,
                eval_size=eval_size,
                epochs=epochs,
                stop=0,
                batch=16,
                optim=optim,
                sampling=replace(stage.sampling, fill=True),
                augment=replace(stage.augment, pad=8),
            )
        )
    net = NetConfig(
        "tf_efficientnet_lite0", "lite0", input=InputSpec(mean=half, std=half)
    )
    return Recipe("glr2021/lite0", net, tuple(stages))


CHAINS = (
    _chain("seresnet101_ibn_a", 384, (768, 768, 144, 144), 4, c2x_stop=0),
    _chain("resnext101_ibn_a", 384, (320, 320, 144, 144), 4, c2x_stop=2),
    _chain("resnest101e", 384, (288, 704, 320, 320), 2, c2x_stop=0),
    _chain(
        "resnest269e",
        448,
        (224, 224, 48, 48),
        2,
        c2x_stop=4,
        decay=5e-4,
        head=Head(margin=0.0, scale=60.0),
    ),
)
ALL = (
    *CHAINS,
    _resnet50(),
    *map(_as_in_the_paper, CHAINS),
    _lite0(CHAINS[0]),
)
