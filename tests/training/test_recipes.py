"""Every stage of the published recipes against recipes.csv, which was typed from the systems' own tables."""

import csv
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from kit import config
from kit.data import templates
from kit.models import backbones
from kit.models.net import EmbeddingNet
from kit.training import optim, recipes
from kit.training.job import Job, Stage
from kit.training.recipes.recipe import Recipe

with (Path(__file__).parent / "recipes.csv").open(newline="") as opened:
    ROWS = list(csv.DictReader(opened))
PUBLISHED = [
    recipe
    for recipe in recipes.RECIPES.values()
    if recipe.name.startswith("glr") and not recipe.name.endswith("/lite0")
]
EVERY = list(recipes.RECIPES.values())
NETWORKS = list({recipe.net: recipe for recipe in reversed(EVERY)}.values())
CHAINED = [(recipe, stage) for recipe in EVERY for stage in recipe.stages[1:]]
TAILS = [(recipe, stage) for recipe, stage in CHAINED if stage.start]
FROM_TIMM = [recipe for recipe in EVERY if recipe.net.pretrained == "timm"]
FIXED = {  # the same in every stage of both systems
    "freeze": 0,
    "sync_norms": False,
    "lora": 0,
    "ema": 0.0,
    "optimizer": "momentum",
    "momentum": 0.9,
    "head_lr": 1.0,
    "layer_decay": 1.0,
    "clip": 0.0,
    "schedule": "cosine",
    "warmup_from": 0.01,
    "centres": 1,
    "rare_margin": 0.0,
    "margin_epochs": 0.0,
    "smoothing": 0.0,
    "class_power": 0.0,
    "noisy_weight": 1.0,
    "sampled": 1.0,
    "triplet": 0.0,
    "contrastive": 0.0,
    "centre_loss": 0.0,
    "continents": (
        ("Asia", 0.5),
        ("Europe", 0.2),
        ("Africa", 0.15),
        ("North America", 0.1),
        ("South America", 0.02),
        ("Antarctica", 0.01),
        ("Oceania", 0.01),
        ("OTHER", 0.01),
    ),
    "clean_share": 0.66,
    "fill": False,
    "epoch_size": 0,
    "crop": 1.0,
    "jitter": 0.0,
    "photometric": 0.0,
    "augmix": 0.0,
    "patch": 0.0,
    "zoom": 0.0,
    "shear_probability": 0.5,
    "tone_probability": 0.5,
    "motion_blur": 0.0,
    "clahe": 0.0,
    "auto_augment": 0.0,
    "rand_augment": 0.0,
    "trivial_augment": 0.0,
    "drop_path": 0.0,
    "pool_p": 3.0,
    "neck": "bn",
    "dim": 512,
    "prelu": False,
    "dropout": 0.0,
    "resize": "squash",
    "colour": "rgb",
    "mean": (0.485, 0.456, 0.406),
}
IDLE = {  # without effect while what they belong to is off
    *("adacos_angle", "rare_power", "margin_start", "triplet_margin"),
    *("contrastive_margin", "centre_rate", "rand_magnitude", "jitter_probability"),
    *("zoom_probability", "milestones", "gamma", "per_class"),
}
OURS = {"seed", "max_unreadable", "eval_size"}  # the tables do not have them
# columns of another kind: where a row belongs, what the list is, Stage.last
NOT_FIELDS = {"recipe", "stage", "clean_list", "gld_v1_classes", "last"}
CLEANING = {  # 2019's names (neighbours that agree, inliers) -> Recipe.clean
    "public": "",
    "f3 v30": "",  # which became the public one
    "f2 v30": "30 inliers with at least 2 neighbours",
}
CLASSES = {"gld_v1": 0, "clean": 1, "c2x": 1, "full": 2, "all": 2}  # 14,950 .. 203,094


def leaves(part: Any) -> dict[str, Any]:
    """Every field that holds a value, by its name."""
    found = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= leaves(value) if inner else {field.name: value}
    return found


def job(recipe: Recipe, stage: Stage) -> Job:
    return Job(stage, recipe.net, Path(), Path(), Path())


def facts(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """All that decides the stage's weights; the input as it is while training."""
    net = leaves(recipe.net) | leaves(job(recipe, stage).shown)
    return net | leaves(stage) | {"last": stage.last}


def typed(cell: str, like: Any) -> Any:
    """A cell as a value of the type that the field has."""
    if isinstance(like, bool):
        return {"yes": True, "no": False}[cell]
    if isinstance(like, tuple):
        return tuple(float(Fraction(part)) for part in cell.split())
    return cell if isinstance(like, str) else float(Fraction(cell))


def shapes(recipe: Recipe) -> list[tuple[int, int]]:
    """(h, w) of every input of a recipe, smallest first."""
    shown = [job(recipe, stage).shown for stage in recipe.stages]
    turned = ((1, 2), (3, 4), (1, 1), (4, 3), (2, 1))
    return sorted({spec.shape(*size) for spec in shown for size in turned})


def stride(recipe: Recipe) -> int:
    """Pixels that a step of the last map stands for."""
    return recipe.net.stride or (14 if "patch14" in recipe.net.backbone else 32)


def lists(recipe: Recipe) -> list[str]:
    return [stage.images for stage in recipe.stages]


def sizes(recipe: Recipe) -> list[int]:
    return [stage.size for stage in recipe.stages]


def label(value: Any) -> str:
    return str(getattr(value, "name", ""))


def of_row(row: dict[str, str]) -> str:
    return f"{row['recipe']}-{row['stage']}"


# --- the published ones -------------------------------------------------------------------------


def test_every_published_stage_has_a_row_and_every_row_a_stage():
    rows = [(row["recipe"], row["stage"]) for row in ROWS]
    stages = [
        (recipe.name, stage.name) for recipe in PUBLISHED for stage in recipe.stages
    ]
    assert sorted(rows) == sorted(stages)
    for recipe in PUBLISHED:  # in the order of training
        there = [stage for name, stage in rows if name == recipe.name]
        assert there == [stage.name for stage in recipe.stages]


def test_every_field_is_in_the_table_or_fixed_or_of_no_effect():
    known = [*ROWS[0], *FIXED, *IDLE, *OURS]
    assert len(set(known)) == len(known)
    recipe = PUBLISHED[0]
    stage = recipe.stages[0]
    assert set(leaves(recipe.net)) & set(leaves(stage)) == {"size", "template"}
    fields = set(facts(recipe, stage)) - {"name", "stop"}
    assert fields - set(known) == set()
    assert set(known) - fields == NOT_FIELDS - {"last"}


@pytest.mark.parametrize("row", ROWS, ids=of_row)
def test_a_stage_is_as_published(row):
    recipe = recipes.get(row["recipe"])
    found = facts(recipe, recipe.stage(row["stage"]))
    released = Path(found["pretrained"])
    found["pretrained"] = released.stem  # the tables say no suffix
    assert released.suffix == (".tar" if "fishnet" in released.stem else ".pth")
    columns = set(row) - NOT_FIELDS | {"last"}
    if not row["init"]:  # there is no classifier to keep
        columns.remove("keep_head")
    expected = FIXED | {name: typed(row[name], found[name]) for name in columns}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("recipe", PUBLISHED, ids=label)
def test_a_recipe_says_how_its_clean_list_was_made(recipe):
    rows = [row for row in ROWS if row["recipe"] == recipe.name]
    made = {row["clean_list"] for row in rows if row["clean_list"]}
    assert len(made) <= 1
    assert recipe.clean == "".join(CLEANING[name] for name in made)


@pytest.mark.parametrize("recipe", PUBLISHED, ids=label)
def test_a_recipe_says_how_many_landmarks_its_first_generation_has(recipe):
    rows = [row for row in ROWS if row["recipe"] == recipe.name]
    said = {int(row["gld_v1_classes"]) for row in rows if row["gld_v1_classes"]}
    assert said <= {recipe.gld_v1_classes}


@pytest.mark.parametrize("recipe", PUBLISHED, ids=label)
def test_a_published_backbone_is_a_preset_that_its_release_fills(recipe):
    family = {"ibn_a": "ibn", "resnest": "resnest", "fishnet": "fishnet"}
    family |= {"se_resnext": "pretrainedmodels", "resnet": "torchvision"}
    file = recipe.net.pretrained
    (expected, *_) = [family[part] for part in family if part in file]
    assert expected in backbones.PRESETS[recipe.net.backbone].weights


def test_the_members_that_stop_early_leave_the_rate_where_it_was_published():
    """At 5e-5 after 6 of 7 epochs, far from the 3e-6 at the cosine's end."""
    for name in ("glr2019/v20c", "glr2019/v24c"):
        last = recipes.get(name).stages[-1]
        rate = optim.learning_rate(last.optim, last.last, last.epochs)
        assert rate == pytest.approx(5e-5, rel=0.1)


@pytest.mark.parametrize("recipe", PUBLISHED, ids=label)
def test_a_published_template_is_at_its_own_size(recipe):
    for stage in recipe.stages:
        if stage.template:
            assert stage.size == templates.square_side(stage.template)


# --- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", EVERY, ids=label)
def test_a_stage_starts_from_an_earlier_one(recipe):
    names = [stage.name for stage in recipe.stages]
    assert len(set(names)) == len(names)
    for at, stage in enumerate(recipe.stages):
        assert stage.init in names[:at] if at else stage.init == ""


@pytest.mark.parametrize(("recipe", "stage"), CHAINED, ids=label)
def test_a_classifier_is_kept_only_where_its_classes_stay_the_first(recipe, stage):
    earlier = recipe.stage(stage.init)
    grown = CLASSES[stage.images] - CLASSES[earlier.images]
    if "gld_v1" in (stage.images, earlier.images):
        assert not stage.keep_head
    if stage.keep_head:
        assert grown >= 0
        assert stage.head.loss == earlier.head.loss
        assert stage.head.centres == earlier.head.centres


@pytest.mark.parametrize(("recipe", "stage"), TAILS, ids=label)
def test_a_tail_goes_on_where_its_schedule_was_left(recipe, stage):
    earlier = recipe.stage(stage.init)
    assert stage.start == earlier.last
    assert stage.last == stage.epochs
    assert stage.keep_head
    assert stage.frozen_norms
    assert stage.size > earlier.size
    changed = ("name", "init", "start", "stop", "keep_head", "frozen_norms")
    changed += ("size", "template")
    own = {name: getattr(stage, name) for name in changed}
    assert dataclasses.replace(earlier, **own) == stage  # all else is as it was


@pytest.mark.parametrize("recipe", EVERY, ids=label)
def test_extraction_is_at_the_size_of_training_or_larger(recipe):
    for stage in recipe.stages:
        assert job(recipe, stage).kept.input.size >= stage.size


@pytest.mark.parametrize("recipe", EVERY, ids=label)
def test_a_recipe_survives_json(recipe, tmp_path):
    assert config.read(Recipe, config.write(recipe, tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize("recipe", EVERY, ids=label)
def test_every_input_of_a_recipe_is_whole_steps_of_its_last_map(recipe):
    sides = {side for shape in shapes(recipe) for side in shape}
    assert {side % stride(recipe) for side in sides} == {0}


@pytest.mark.parametrize("recipe", NETWORKS, ids=label)
def test_the_inputs_of_a_recipe_go_through_its_network(recipe):
    """On the meta device, where shapes are computed and numbers are not."""
    height, width = shapes(recipe)[0]
    with torch.device("meta"):
        net = EmbeddingNet(job(recipe, recipe.stages[0]).kept).eval()
        images = torch.empty(1, 3, height, width)
        maps = backbones.maps(net.backbone, images, net.stages)
        assert net.neck(net.pool(maps)).shape == (1, 512)
    grid = height // stride(recipe), width // stride(recipe)
    assert maps[-1].shape[2:] == grid


@pytest.mark.parametrize("recipe", FROM_TIMM, ids=label)
def test_timm_has_the_weights_that_a_recipe_wants_of_it(recipe):
    name = recipe.net.backbone
    preset = backbones.PRESETS.get(name)
    about = timm.models.get_pretrained_cfg(preset.timm if preset else name)
    assert about is not None
    assert about.has_weights


def test_a_file_of_weights_is_looked_for_in_its_folder():
    recipe = recipes.get("glr2021/resnest101e")
    folder = Path("somewhere")
    asked = {
        choice: recipe.network(choice, folder).pretrained
        for choice in ("recipe", "timm", "", "other.safetensors")
    }
    assert asked == {
        "recipe": str(folder / "resnest101-22405ba7.pth"),
        "timm": "timm",
        "": "",
        "other.safetensors": str(folder / "other.safetensors"),
    }
    assert recipes.get("toy").network("recipe", folder).pretrained == "lite0"


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("glr2021/seresnet101", "glr2021/seresnet101_ibn_a"),
        ("glr2019/v19", "glr2019/v19c"),
        ("moder", "modern"),
    ],
)
def test_an_unknown_recipe_is_refused_with_close_ones(name, close):
    with pytest.raises(ValueError, match=f"recipe '{name}' is not one of ") as refused:
        recipes.get(name)
    said, hint = str(refused.value).split(" (close: ")
    assert close in hint.removesuffix(")").split(", ")
    assert all(recipe.name in said for recipe in EVERY)


def test_an_unknown_stage_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="recipe toy has no stage 'full'; stages: clean, c2x$"
    ):
        recipes.get("toy").stage("full")


# --- our own ------------------------------------------------------------------------------------


def test_the_small_chain_of_2021_has_every_kind_of_stage():
    small = recipes.get("glr2021/lite0")
    published = recipes.get("glr2021/seresnet101_ibn_a")
    assert small.net.pretrained == "lite0"
    assert lists(small) == ["clean", "c2x", "full", "all"]
    for ours, theirs in zip(small.stages, published.stages, strict=True):
        assert (ours.name, ours.init) == (theirs.name, theirs.init)
        assert ours.keep_head
        assert ours.head == theirs.head
        assert ours.augment.erase == theirs.augment.erase == 1
        assert ours.augment.pad > 0
        assert ours.sampling.order == theirs.sampling.order
        assert ours.sampling.continents == theirs.sampling.continents
        assert ours.size < theirs.size
        assert ours.epochs <= theirs.epochs
        assert ours.last == ours.epochs  # short as they are, each to its end
    assert small.stages[-1].sampling.fill  # a small list lacks continents
    assert sizes(small) == sorted(sizes(small))
    assert sizes(small)[0] < sizes(small)[-1]


def test_the_small_chain_of_2019_has_every_kind_of_stage():
    small = recipes.get("glr2019/lite0")
    _, clean, tail = small.stages
    assert small.net.pretrained == "lite0"
    assert lists(small) == ["full", "clean", "clean"]  # full stands for gld_v1
    assert not clean.keep_head
    assert tail.keep_head
    assert [stage.frozen_norms for stage in small.stages] == [False, False, True]
    assert tail.start == clean.last < clean.epochs == tail.last
    assert tail.size > clean.size
    for stage in small.stages:
        published = templates.TEMPLATES[stage.template]
        assert len(published) == 5
        assert stage.size < templates.square_side(stage.template)
        assert stage.augment.flip == 0
        assert stage.augment.crop_scale > 0
    assert small.net.neck_bias
    assert small.net.neck_norm_bias


def test_the_quick_recipe_is_one_stage_of_resnet50():
    fast = recipes.get("fast")
    assert (fast.net.backbone, fast.net.pretrained) == ("resnet50", "timm")
    assert lists(fast) == ["clean"]
    assert sizes(fast) == [256]


def test_the_toy_goes_from_clean_to_noisy_images_at_a_larger_size():
    toy = recipes.get("toy")
    assert toy.net.pretrained == "lite0"
    assert lists(toy) == ["clean", "c2x"]
    assert sizes(toy)[0] < sizes(toy)[1]
    assert toy.stages[1].optim.lr < toy.stages[0].optim.lr


def test_the_modern_recipe_grows_in_classes_and_size():
    modern = recipes.get("modern")
    assert modern.net.pretrained == "timm"
    assert lists(modern) == ["clean", "c2x", "full"]
    assert sizes(modern) == sorted(set(sizes(modern)))
    assert len(modern.stages) > 1
    for stage in modern.stages:
        assert stage.keep_head
        assert stage.head.loss == "arcface"
        assert stage.head.centres == 3
        assert stage.head.margin == 0.05
        assert stage.head.rare_margin == 0.45
        assert stage.head.rare_power == 0.25
        assert stage.optim.optimizer == "adamw"
        assert 0.5 < stage.optim.layer_decay < 1
    rates = [stage.optim.lr for stage in modern.stages]
    assert rates == sorted(rates, reverse=True)
