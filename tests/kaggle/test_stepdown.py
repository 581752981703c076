import itertools

import numpy as np
import pytest

from kit.kaggle.stepdown import fewer, plan

S = {0.5: 1.0, 1.0: 4.0, 2.0: 16.0}  # seconds of an image
T = {0.5: 2.0, 1.0: 8.0, 2.0: 32.0}


def test_of_scales_the_farthest_from_1_goes_and_of_two_the_larger():
    assert fewer((0.707, 1.0, 1.414)) == [
        (0.707, 1.0, 1.414),
        (0.707, 1.0),
        (1.0,),
    ]
    assert fewer((1.25, 0.5, 1.0)) == [(1.25, 0.5, 1.0), (1.25, 1.0), (1.0,)]
    assert fewer((1.0,)) == [(1.0,)]


@pytest.mark.parametrize(
    "left, models, scales, cost",
    [
        (640, ("s", "t"), (0.5, 1.0, 2.0), 640),  # 10 x (21 + 42) + 10
        (639.9, ("s", "t"), (0.5, 1.0), 160),  # 10 x (5 + 10) + 10
        (160, ("s", "t"), (0.5, 1.0), 160),
        (159.9, ("s", "t"), (1.0,), 130),  # 10 x (4 + 8) + 10
        (129.9, ("s",), (0.5, 1.0), 55),  # a model less leaves room for a scale more
        (54.9, ("s",), (1.0,), 45),
    ],
)
def test_scales_go_first_and_then_models(left, models, scales, cost):
    found = plan({"s": S, "t": T}, 10, left, rest=[5.0, 10.0])
    assert found[:4] == (models, scales, pytest.approx(cost), True)


def test_where_nothing_fits_it_is_the_cheapest_and_says_so():
    found = plan({"s": S, "t": T}, 10, 49.9, rest=[10.0, 10.0])
    assert found[:4] == (("s",), (1.0,), pytest.approx(50), False)
    assert found.statement == (
        "nothing fits: even s at scale 1 takes 0.01 h of the 0.01 h left"
    )


def test_the_statement_names_what_is_left_out():
    models = {"s": S, "t": T}
    whole = plan(models, 3600, 100 * 3600.0)
    assert whole.statement == (
        "all of it fits: s, t at scales 0.5, 1, 2 takes 63.00 h of the 100.00 h left"
    )
    assert plan(models, 3600, 14 * 3600.0).statement == (
        "the whole plan takes 63.00 h: without scale 0.5, scale 2 it takes 12.00 h of the "
        "14.00 h left (s, t at scale 1)"
    )
    assert (
        "without scale 0.5, scale 2, t it" in plan(models, 3600, 4 * 3600.0).statement
    )


def test_the_loader_is_a_floor_beside_a_gpu_and_an_addend_on_a_cpu():
    models = {"s": {1.0: 4.0}}
    assert plan(models, 10, 1e9, decode=7.0).seconds == 70
    assert plan(models, 10, 1e9, decode=3.0).seconds == 40
    assert plan(models, 10, 1e9, decode=3.0, overlap=False).seconds == 70


def test_images_that_are_done_count_only_where_the_scales_stay():
    models = {"s": S, "t": T}
    assert plan(models, 10, 1e9, done=4).seconds == 6 * 63
    # 8 of 10 are done: a model less at all scales (2 x 21) is what fits in 100 seconds
    found = plan(models, 10, 100.0, done=8)
    assert found[:3] == (("s",), (0.5, 1.0, 2.0), 42)
    # with 120 seconds both models begin again at one scale
    assert plan(models, 10, 120.0, done=8)[:3] == (("s", "t"), (1.0,), 120)
    assert plan(models, 10, 0.0, done=10)[:4] == (("s", "t"), (0.5, 1.0, 2.0), 0, True)


def test_only_scales_that_references_have_are_offered():
    offered = [(0.5, 1.0, 2.0), (0.5,)]
    found = plan({"s": S, "t": T}, 10, 200.0, scales=offered)
    assert found[:3] == (("s", "t"), (0.5,), 30)


def test_less_time_never_gives_a_dearer_plan():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scales = rng.choice([0.5, 0.707, 1.0, 1.25, 1.414], rng.integers(1, 5), False)
        costs = rng.uniform(0.1, 5, (rng.integers(1, 5), len(scales)))
        models = {
            f"m{n}": dict(zip(scales.tolist(), row.tolist(), strict=True))
            for n, row in enumerate(costs)
        }
        images = int(rng.integers(0, 50))
        options = {
            "rest": sorted(rng.uniform(0, 20, len(costs)).tolist()),
            "decode": float(rng.uniform(0, 3)),
            "overlap": bool(rng.integers(2)),
            "done": int(rng.integers(0, images + 1)),
        }
        times = np.sort(rng.uniform(0, 1.2 * images * costs.sum() + 30, 30))
        found = [plan(models, images, float(left), **options) for left in times]
        for less, more in itertools.pairwise(found):
            assert less.seconds <= more.seconds
            assert less.fits <= more.fits
            if options["done"] == 0:
                assert len(less.models) <= len(more.models)
        for left, each in zip(times, found, strict=True):
            assert each.fits == (each.seconds <= left)
            assert each.models == tuple(models)[: len(each.models)]


@pytest.mark.parametrize(
    "models, options, said",
    [
        ({}, {}, "no model or no scale"),
        ({"s": {}}, {}, "no model or no scale"),
        ({"s": S, "t": {1.0: 1.0}}, {}, "model t: scale 0.5 is not measured for all"),
        ({"s": {1.0: 1.0}, "t": S}, {}, "model t: scale 0.5 is not measured for all"),
        ({"s": S}, {"scales": [(3.0,)]}, "model s: scale 3 is not measured for all"),
        ({"s": S}, {"done": 11}, "11 of 10 images are done"),
    ],
)
def test_a_plan_without_measurements_is_refused(models, options, said):
    with pytest.raises(ValueError, match=said):
        plan(models, 10, 1.0, **options)
