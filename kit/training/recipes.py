"""Recipes: a network and the stages it goes through, as plain Python."""

from dataclasses import dataclass, replace

from kit.data.augment import Augment
from kit.data.inputs import InputSpec
from kit.models.net import NetConfig
from kit.training.stage import Stage

UNTRAINED = "untrained"  # no stage: the pretrained backbone, pooled, no neck


@dataclass(frozen=True)
class Recipe:
    """A schedule; each stage goes on from the one that its `init` names."""

    name: str
    net: NetConfig
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        there = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"recipe {self.name} has no stage {name!r}; stages: {there}")


def get(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _toy() -> Recipe:
    """Minutes on two CPU cores: EfficientNet-lite0, clean landmarks first, then their noisy images."""
    half = (0.5, 0.5, 0.5)
    clean = Stage(
        "clean",
        images="clean",
        size=192,
        eval_size=224,
        epochs=5,
        batch=16,
        lr=1e-3,
        warmup=0.5,
        optimizer="adamw",
        weight_decay=5e-2,
        clip=5.0,
        augment=Augment(crop=0.4, jitter=0.3),
    )
    c2x = replace(
        clean,
        name="c2x",
        images="c2x",
        init="clean",
        size=224,
        eval_size=256,
        epochs=2,
        lr=3e-4,
        warmup=0,
    )
    return Recipe(
        "toy",
        NetConfig(
            "tf_efficientnet_lite0", "lite0", input=InputSpec(mean=half, std=half)
        ),
        (clean, c2x),
    )


RECIPES = {recipe.name: recipe for recipe in (_toy(),)}
