"""Schedules by name: both winning systems', and ours."""

import difflib

from kit.training.recipes import glr2019, glr2021, own
from kit.training.recipes.recipe import Recipe

UNTRAINED = "untrained"  # no stage: the pretrained backbone, pooled, no neck
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*own.ALL, *glr2021.ALL, *glr2019.ALL)
}


def get(name: str) -> Recipe:
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(f"recipe {name!r} is not one of {', '.join(RECIPES)}{hint}")
    return RECIPES[name]
