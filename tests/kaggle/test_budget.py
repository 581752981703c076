import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kit.data.inputs import InputSpec, View
from kit.features.search import QUERIES
from kit.features.views import Views
from kit.kaggle import budget
from kit.kaggle.budget import MACHINES, Images, Machine, Model, Rates, estimate
from kit.models.net import EmbeddingNet, NetConfig
from kit.training import recipes

# Counting


@pytest.mark.parametrize(
    "recipe, giga",
    [
        ("glr2021/resnet50", 16.2),
        ("glr2021/seresnet101_ibn_a", 103.7),
        ("glr2021/resnest101e", 125.1),
    ],
)
def test_a_network_costs_what_the_readme_says_at_the_recipes_size(recipe, giga):
    ((name, config),) = budget.networks([recipe]).items()
    model = budget.count(name, config, Views())
    assert model.gflop == (pytest.approx(giga, abs=0.05),)
    assert (model.name, model.dim) == (recipe, 512)


def test_parameters_and_the_largest_layer_are_those_of_a_resnet50_at_256():
    model = budget.count(
        "r", budget.networks(["glr2021/resnet50"])["glr2021/resnet50"], Views()
    )
    net = EmbeddingNet(recipes.get("glr2021/resnet50").net)
    assert model.parameters == sum(p.numel() for p in net.parameters())
    assert model.weights == pytest.approx(4 * model.parameters / 1e9)
    # the first norm: 64 maps of 128 x 128 in and out, two bytes each
    assert model.activation == pytest.approx(2 * 2 * 64 * 128 * 128 / 1e9)


def small(size=64):
    return NetConfig("resnet18", neck="none", input=InputSpec(size=size))


def test_every_scale_is_counted_at_the_sides_that_extraction_makes():
    model = budget.count("r", small(100), Views(scales=(0.5, 1.0, 1.5)))
    alone = [budget.count("r", small(side), Views()) for side in (48, 100, 144)]
    assert model.gflop == tuple(one.gflop[0] for one in alone)
    assert [view.shape(-1, -1) for view in model.views] == [
        (48, 48),
        (100, 100),
        (144, 144),
    ]
    assert model.activation == max(one.activation for one in alone)
    assert model.dim == 512  # of the pool


def test_a_mirrored_image_costs_as_much_again():
    once, twice = (
        budget.count("r", small(), Views(flip=f)).gflop[0] for f in (False, True)
    )
    assert twice == pytest.approx(2 * once)


def test_a_recipe_is_shown_what_its_last_stage_leaves():
    found = budget.networks(["toy", "glr2021/resnest269e"])
    assert [config.input.size for config in found.values()] == [256, 512]
    assert budget.networks(["toy"], 320)["toy"].input.size == 320
    with pytest.raises(ValueError, match="recipe 'glr' is not one of"):
        budget.networks(["glr"])


# The table

MACHINE = Machine(
    gpus=2,
    network=1.0,
    product=0.5,
    gpu_memory=16.0,
    cores=4,
    decode=10.0,
    ram=30.0,
    disk=20.0,
    hours=12.0,
    cold=0.001,
    warm=0.01,
    source="made up",
)
ONE, TWO = (View(InputSpec(size=side)) for side in (1000, 2000))
A = Model("a", (100.0, 400.0), (ONE, TWO), 300, 50_000_000, 0.01)
B = Model("b", (200.0,), (ONE,), 200, 100_000_000, 0.02)
COUNTS = Images(queries=5_000, index=20_000, references=100_000, known=7_000)


def steps(*arguments, **options):
    return {step.name: step for step in estimate(*arguments, **options).steps}


def test_hours_of_a_case_worked_by_hand():
    found = steps(COUNTS, [A, B], MACHINE)
    fresh = 5_000 + 20_000 - 7_000
    # two views of all, 1 and 4 megapixels; the larger one costs 10 ms a megapixel more
    assert found["decode"].hours == pytest.approx(fresh * (0.1 + 0.04) / 4 / 3600)
    assert found["extract a"].hours == pytest.approx(fresh * 0.5 / 2 / 3600)
    assert found["extract b"].hours == pytest.approx(fresh * 0.2 / 2 / 3600)
    # reading decides: 3 turns of 2,048 queries over 20,000 rows of 500 halves, one cold
    gb = 20_000 * 500 * 2 / 1e9
    assert found["search"].hours == pytest.approx((gb / 0.001 + 2 * gb / 0.01) / 3600)
    assert found["rerank"].hours == pytest.approx(3.1 * found["search"].hours)
    gb = 100_000 * 500 * 2 / 1e9
    turns = math.ceil(5_000 / 2_048) + math.ceil(20_000 / 2_048)
    assert QUERIES == 2_048
    assert found["tag"].hours == pytest.approx(
        (gb / 0.001 + (turns - 1) * gb / 0.01) / 3600
    )
    assert found["write"].hours == pytest.approx(5_000 * 5e-5 / 3600)


def test_where_reading_is_fast_multiplying_decides():
    fast = replace(MACHINE, cold=1e6, warm=1e6)
    found = steps(COUNTS, [A, B], fast)
    flop = 2 * 5_000 * 20_000 * 500
    assert found["search"].hours == pytest.approx(flop / 1e12 / (2 * 0.5) / 3600)


def test_memory_disk_and_upload_of_a_case_worked_by_hand():
    found = steps(COUNTS, [A, B], MACHINE, batch=10)
    # both GPUs' processes, and 4 workers with two batches of 5 megapixels each
    loading = 4 * (0.4 + 2 * 10 * 3 * 5e6 / 1e9)
    assert found["decode"].ram == pytest.approx(2 * 2.5 + loading)
    assert found["extract a"].gpu == pytest.approx(1.5 * 0.2 + 2 * 10 * 0.01)
    assert found["extract a"].disk == pytest.approx(18_000 * (2 * 300 + 64) / 1e9)
    assert found["extract a"].upload == pytest.approx(0.2 + 7_000 * 664 / 1e9)
    rows = 2 * 500 + 2 * 64
    assert found["tag"].upload == pytest.approx(100_000 * rows / 1e9)
    assert found["write"].disk == pytest.approx(5_000 * 1717 / 1e9)
    total = estimate(COUNTS, [A, B], MACHINE, batch=10).total
    # the weights of both, the scratch of the larger
    assert total.gpu == pytest.approx(
        max(0.6 + 1.5 * 0.6 + 2 * 10 * 0.02, found["tag"].gpu)
    )
    assert total.ram == pytest.approx(5 + loading + 2 * 0.2 + 2 * 0.4)
    for name in ("disk", "upload"):
        parts = [getattr(step, name) for step in found.values()]
        assert getattr(total, name) == pytest.approx(sum(parts))


def test_decoding_runs_beside_the_gpus_and_in_turn_with_a_cpus_networks():
    for machine, together in ((MACHINE, max), (replace(MACHINE, gpus=0), sum)):
        made = estimate(COUNTS, [A, B], machine)
        hours = {step.name: step.hours for step in made.steps}
        decode, networks = (
            hours.pop("decode"),
            hours.pop("extract a") + hours.pop("extract b"),
        )
        expected = together((decode, networks)) + sum(hours.values())
        assert made.total.hours == pytest.approx(expected)
        assert (made.total.gpu > 0) == (machine.gpus > 0)


def test_what_was_measured_replaces_the_rates_of_decoding_and_networks():
    rates = Rates(36.0, {"a": {1.0: 0.25, 2.0: 0.75}, "b": {1.0: 0.5}})
    table, measured = (steps(COUNTS, [A, B], MACHINE, r) for r in (None, rates))
    assert measured["decode"].hours == pytest.approx(18_000 / 36 / 3600)
    assert measured["extract a"].hours == pytest.approx(18_000 * 1.0 / 3600)
    assert measured["extract b"].hours == pytest.approx(18_000 * 0.5 / 3600)
    for name in ("search", "tag", "rerank", "write"):
        assert measured[name] == table[name]


@pytest.mark.parametrize("field", ["queries", "index", "references"])
def test_more_images_never_cost_less_and_none_cost_nothing(field):
    sums = []
    for number in (0, 7_000, 100_000, 1_000_000):
        images = replace(COUNTS, known=0, **{field: number})
        sums.append(estimate(images, [A, B], MACHINE).total)
    for less, more in itertools.pairwise(sums):
        assert all(a <= b for a, b in zip(less[1:], more[1:], strict=True))
        assert less.hours < more.hours
    nothing = estimate(Images(0, 0, 0), [A], MACHINE).total
    assert (nothing.hours, nothing.disk) == (0, 0)


def test_index_features_that_travel_save_hours_and_cost_upload():
    less, more = (
        estimate(replace(COUNTS, known=k), [A], MACHINE).total for k in (0, 9_000)
    )
    assert more.hours < less.hours and more.upload > less.upload


def test_references_beyond_the_free_memory_are_read_again_in_each_turn():
    # 100,000 x 500 halves are 0.1 GB; a process and a search take 3.1
    fits, lacks = (replace(MACHINE, ram=r) for r in (3.21, 3.19))
    warm, cold = (steps(COUNTS, [A, B], m)["tag"].hours for m in (fits, lacks))
    assert cold == pytest.approx(13 * 0.1 / 0.001 / 3600)
    assert warm == pytest.approx((0.1 / 0.001 + 12 * 0.1 / 0.01) / 3600)
    (said,) = [p for p in estimate(COUNTS, [A, B], lacks).problems if "mapped" in p]
    assert said.startswith("0.1 GB of mapped references do not stay in 0.1 GB of free")
    assert not any("mapped" in p for p in estimate(COUNTS, [A, B], fits).problems)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"hours": 0.5},
            "hours do not fit in a session of 0.5; the longest step, extract a,",
        ),
        ({"ram": 5.0}, "GB of RAM do not fit in 5"),
        ({"gpu_memory": 1.5}, "GB on a GPU do not fit in 1.5"),
        ({"disk": 0.01}, "GB of files do not fit in 0.01"),
        ({"warning": "no kernels"}, "no kernels"),
    ],
)
def test_what_does_not_fit_is_said_and_what_fits_is_not(change, said):
    roomy = replace(MACHINE, hours=100.0, cold=1.0, warm=1.0)
    assert estimate(COUNTS, [A, B], roomy).problems == ()
    (problem,) = estimate(COUNTS, [A, B], replace(roomy, **change)).problems
    assert said in problem


def test_an_upload_beyond_the_quota_is_said():
    many = replace(COUNTS, references=90_000_000)
    assert any(
        "GB of upload do not fit in 100" in p
        for p in estimate(many, [A, B], MACHINE).problems
    )


def test_nothing_to_estimate_is_refused():
    with pytest.raises(ValueError, match="no model"):
        estimate(COUNTS, [], MACHINE)
    with pytest.raises(ValueError, match="8 of 7 index images are known"):
        Images(index=7, known=8)
    with pytest.raises(ValueError, match="queries is -1"):
        Images(queries=-1)
    with pytest.raises(ValueError, match=r"cold is 0\.0, not above 0"):
        replace(MACHINE, cold=0.0)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_says_where_its_rates_are_from(name):
    source = MACHINES[name].source
    assert "assumed" in source or "measured" in source
    assert source in budget.table(estimate(COUNTS, [A], MACHINES[name]), MACHINES[name])


def test_the_table_has_a_line_a_step_and_one_a_problem():
    tight = replace(MACHINE, hours=0.5, disk=0.01)
    made = estimate(COUNTS, [A, B], tight)
    lines = budget.table(made, tight).splitlines()
    names = [
        "decode",
        "extract a",
        "extract b",
        "search",
        "tag",
        "rerank",
        "write",
        "total",
    ]
    assert [line[:9].strip() for line in lines[1:9]] == names
    assert len({len(line) for line in lines[:9]}) == 1  # columns stand below each other
    assert float(lines[8].split()[1]) == pytest.approx(made.total.hours, abs=0.005)
    assert [line[2:] for line in lines if line.startswith("! ")] == list(made.problems)
    assert len(made.problems) == 2


def test_the_command_prints_the_table_of_2021s_counts(capsys):
    budget.main(["--recipe", "glr2021/resnet50", "--machine", "t4x2"])
    said = capsys.readouterr().out
    assert said.startswith("t4x2: 879,334 images to extract\n")
    hours = float(
        next(x for x in said.splitlines() if x.startswith("extract")).split()[2]
    )
    # 16.2 GFLOP an image at 2 x 9.5 TFLOP/s
    assert hours == pytest.approx(879_334 * 16.215e9 / 19e12 / 3600, abs=0.006)


def test_the_command_takes_other_counts_and_hours(capsys):
    counts = ["--queries", "10", "--index", "20", "--references", "30", "--known", "5"]
    budget.main(["--recipe", "toy", "--machine", "cpu2", "--hours", "0.0001", *counts])
    said = capsys.readouterr().out
    assert said.startswith("cpu2: 25 images to extract\n")
    assert "do not fit in a session of 0.0001" in said


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    return tmp_path


def test_the_command_measures_on_photos_and_says_so(photos, capsys, monkeypatch):
    rates = []
    made = budget.measure
    monkeypatch.setattr(
        budget, "measure", lambda *a, **o: rates.append(made(*a, **o)) or rates[0]
    )
    asked = ["--recipe", "toy", "--machine", "cpu2", "--size", "32", "--batch", "2"]
    budget.main(
        [*asked, "--measure", str(photos), "--seconds", "0.2", "--workers", "0"]
    )
    said = capsys.readouterr().out
    assert "Decoding and networks: measured here instead." in said
    hours = float(
        next(x for x in said.splitlines() if x.startswith("extract")).split()[2]
    )
    expected = 879_334 * rates[0].seconds["toy"][1.0] / 3600
    assert hours == pytest.approx(expected, abs=0.006)


def test_a_folder_without_photos_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .jpg in"):
        budget.main(["--recipe", "toy", "--measure", str(tmp_path)])
