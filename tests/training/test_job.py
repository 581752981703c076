import dataclasses
import math

import pytest

from kit import config
from kit.losses.heads import Head
from kit.models.net import NetConfig
from kit.training.job import Job, Stage, change
from kit.training.optim import Optim

PLAN = Stage("first", images="clean", size=32, epochs=4, batch=8, optim=Optim(0.1))


def test_a_job_survives_its_file(tmp_path):
    job = Job(PLAN, NetConfig(), tmp_path / "lists", tmp_path, tmp_path / "runs")
    assert config.read(Job, job.write()) == job


def test_no_two_fields_of_a_stage_share_a_name():
    assert len(config.field_names(PLAN)) > 60


def test_fields_of_the_parts_are_changed_by_their_names():
    changed = change(PLAN, epochs=3, flip=0.0, lr=0.2, margin=0.1, order="pxk")
    parts = (changed.augment.flip, changed.optim.lr, changed.head.margin)
    assert (changed.epochs, *parts, changed.sampling.order) == (3, 0.0, 0.2, 0.1, "pxk")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"epoch": 3},
            r"stage first: no field 'epoch' \(close: epochs\); fields: .*lr",
        ),
        ({"name": "x"}, "stage first keeps its name"),
        ({"optimizer": "sgdm"}, "stage first: optimizer 'sgdm' is not one of momentum"),
        ({"loss": "arc"}, "stage first: head: loss 'arc' is not one of arcface, cos"),
        ({"order": "random"}, "stage first: order 'random' is not one of shuffle"),
        ({"template": 3}, "stage first: template cannot be 3"),
        ({"template": "longest"}, "stage first: template longest is for extraction"),
        ({"template": "bounded"}, "stage first: template bounded is for extraction"),
        ({"epochs": 0}, "stage first: epochs is 0, not at least 1"),
        ({"stop": 5}, "stage first: stop is 5, not at most 4"),
        ({"start": 4}, "stage first: start is 4, not before its last epoch 4"),
        ({"start": 2, "stop": 2}, "start is 2, not before its last epoch 2"),
        ({"freeze": 1, "lora": 4}, "stage first: freeze is for networks that then"),
        ({"lr": 0}, "stage first: lr is 0, not at least 1e-12"),
        ({"layer_decay": 1.1}, "stage first: layer_decay is 1.1, not at most 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        change(PLAN, **fields)


NUMBERS = [
    each.name
    for part in (Stage, Head, Optim)
    for each in dataclasses.fields(part)
    if each.type in (int, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e308, 10**400, True, "1"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_of_its_meaning_must_be_refused_by_name(name, value):
    with pytest.raises(
        ValueError, match=rf"^stage first: .*\b{name}\b.* (is|cannot be) "
    ):
        change(PLAN, **{name: value})


@pytest.mark.parametrize("epochs", [(-1.0,), (2.0, 1.0), (1.0, 1.0), (math.nan,)])
def test_milestones_must_rise_from_zero(epochs):
    with pytest.raises(ValueError, match="milestones"):
        change(PLAN, milestones=epochs)


def test_the_network_is_saved_with_the_input_that_extraction_uses(tmp_path):
    plan = change(PLAN, size=448, template="S2", eval_size=512)
    job = Job(plan, NetConfig(), tmp_path, tmp_path, tmp_path)
    assert (job.shown.size, job.shown.template) == (448, "S2")
    assert (job.kept.input.size, job.kept.input.template) == (512, "")
    as_trained = dataclasses.replace(job, stage=change(plan, eval_size=0))
    assert as_trained.kept.input.size == 448


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "fits"),
    [
        *((1, 1, 1, False), (4, 1, 4, False), (4, 2, 2, False), (2, 4, 1, False)),
        *((2, 1, 1, True), (8, 2, 2, True), (6, 1, 4, False)),
    ],
)
def test_parts_of_a_batch_must_hold_two_images_for_a_batch_norm(
    tmp_path, batch, world, accumulate, fits
):
    plan, places = change(PLAN, batch=batch), (tmp_path, tmp_path, tmp_path)
    job = Job(plan, NetConfig(), *places, accumulate=accumulate)
    bare = Job(plan, NetConfig(neck="none"), *places, accumulate=accumulate)
    if fits:
        job.check_parts(world)
        return
    with pytest.raises(ValueError, match=f"stage first: .*batch.* {accumulate} part"):
        job.check_parts(world)
    if batch // world % accumulate == 0:
        bare.check_parts(world)
        frozen = dataclasses.replace(job, stage=change(plan, frozen_norms=True))
        frozen.check_parts(world)
