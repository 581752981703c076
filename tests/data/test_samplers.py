import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from kit import config
from kit.data.orders import grouped, shuffle
from kit.data.samplers import ORDERS, QUOTA, Batches, Sampling

SHUFFLE = Sampling()
CONTINENT = Sampling("continent")
CASES = [
    (12, 4, 1),
    (12, 4, 2),
    (13, 4, 4),
    (10, 6, 3),
    (3, 8, 2),
    (1, 1, 1),
    (7, 7, 7),
]
TWO = (("Asia", 0.75), ("Europe", 0.25))


def columns(length=60, classes=7, seed=3):
    """Labels, trust, continents (two with a quota, two without) and groups of a list."""
    rng = np.random.default_rng(seed)
    names = np.array(["Asia", "Europe", "Africa", ""], dtype=object)
    return {
        "labels": rng.integers(0, classes, length),
        "clean": rng.random(length) < 0.5,
        "continents": names[rng.integers(0, 4, length)],
        "groups": rng.integers(0, 3, length),
    }


def batches(sampling, length=60, batch=12, first=0, last=2, seed=0, **options):
    given = columns(length)
    if sampling.order != "continent":
        del given["clean"], given["continents"]
    if not options.pop("grouped", False):
        del given["groups"]
    return Batches(
        sampling, given.pop("labels"), batch, first, last, seed, **given, **options
    )


def rows(batches):
    return [row for batch in batches for _, row in batch]


def side_by_side(ranks):
    """The batches of all ranks, one each -> those of one process."""
    return [
        [key for part in parts for key in part] for parts in zip(*ranks, strict=True)
    ]


def shuffled(length, batch, *args, **options):
    return list(Batches(SHUFFLE, np.zeros(length, int), batch, *args, **options))


EVERY = [
    (SHUFFLE, {}),
    (SHUFFLE, {"grouped": True}),
    (Sampling("shuffle", epoch_size=31), {}),
    (Sampling("class_balanced"), {}),
    (Sampling("class_balanced", epoch_size=50), {}),
    (Sampling("image_uniform", per_class=3), {}),
    (Sampling("pxk", per_class=4), {}),
    (Sampling("pxk", per_class=2, epoch_size=40), {}),
    (Sampling("continent", continents=TWO), {}),
    (Sampling("continent", continents=TWO, epoch_size=100), {}),
]


# Every order


@pytest.mark.parametrize(("sampling", "options"), EVERY)
def test_ranks_side_by_side_are_the_batch_of_one_process(sampling, options):
    alone = list(batches(sampling, **options))
    assert alone
    for world in (2, 3, 4):
        ranks = [
            list(batches(sampling, rank=rank, world=world, **options))
            for rank in range(world)
        ]
        assert all(len(part) == 12 // world for rank in ranks for part in rank)
        assert side_by_side(ranks) == alone


@pytest.mark.parametrize(("sampling", "options"), EVERY)
def test_a_step_in_the_middle_continues_exactly(sampling, options):
    for rank in range(2):
        where = options | {"rank": rank, "world": 2, "last": 3}
        whole = batches(sampling, **where)
        expected = list(whole)
        assert len(expected) == whole.steps == 3 * whole.per_epoch > 0
        for step in range(len(expected) + 1):
            rest = batches(sampling, step=step, **where)
            assert len(rest) == len(expected) - step
            assert list(rest) == expected[step:]


@pytest.mark.parametrize(("sampling", "options"), EVERY)
def test_a_schedule_in_two_stages_is_the_schedule(sampling, options):
    whole = list(batches(sampling, first=0, last=4, **options))
    parts = [batches(sampling, first=f, last=n, **options) for f, n in ((0, 3), (3, 4))]
    assert list(parts[0]) + list(parts[1]) == whole
    rest = batches(sampling, first=1, last=4, step=parts[1].per_epoch + 1, **options)
    assert list(rest) == whole[2 * parts[1].per_epoch + 1 :]


@pytest.mark.parametrize(("sampling", "options"), EVERY)
def test_every_seed_and_epoch_has_an_order_of_its_own(sampling, options):
    seen = set()
    for seed in range(3):
        every = list(batches(sampling, last=3, seed=seed, **options))
        size = len(every) // 3
        seen |= {tuple(rows(every[at : at + size])) for at in range(0, 3 * size, size)}
    assert len(seen) == 9


@pytest.mark.parametrize(("sampling", "options"), EVERY)
def test_a_sampler_gives_the_same_plain_integers_each_time(sampling, options):
    sampler = batches(sampling, step=1, **options)
    once = list(sampler)
    np.random.seed(1)
    assert list(sampler) == once
    numbers = [number for batch in once for number, _ in batch]
    assert numbers == list(range(12, 12 + len(numbers)))
    assert {type(n) for batch in once for key in batch for n in key} == {int}
    assert {len(batch) for batch in once} == {12}
    assert all(0 <= row < 60 for row in rows(once))


@pytest.mark.parametrize(
    ("sampling", "steps"),
    [
        (SHUFFLE, 5),
        (replace(SHUFFLE, epoch_size=31), 3),
        (replace(SHUFFLE, epoch_size=130), 11),
        (Sampling("class_balanced"), 1),
        (Sampling("class_balanced", epoch_size=60), 5),
        (Sampling("pxk"), 5),
        (Sampling("pxk", epoch_size=13), 2),
        (Sampling("image_uniform"), 5),
        (Sampling("image_uniform", per_class=6), 7),
        (Sampling("image_uniform", epoch_size=24), 2),
        (Sampling("continent", continents=TWO), 5),
        (Sampling("continent", continents=TWO, epoch_size=13), 2),
    ],
)
def test_the_size_of_an_epoch(sampling, steps):
    sampler = batches(sampling, last=3)
    assert sampler.per_epoch == steps
    assert sampler.steps == len(list(sampler)) == 3 * steps


@pytest.mark.parametrize("order", ["image_uniform", "pxk", "class_balanced"])
def test_a_million_rows_are_sampled(order):
    length = 1_000_000
    labels = np.random.default_rng(0).zipf(1.3, length) % 50_000
    sampler = Batches(Sampling(order), labels, 1024, 0, 1, 0)
    found = np.array(rows(sampler)).reshape(-1, 1024)
    assert len(found) == sampler.steps
    if order == "class_balanced":
        assert len(set(labels[found].reshape(-1)[: len(set(labels))])) == len(
            set(labels)
        )
    else:
        by_class = labels[found].reshape(-1, 4)
        assert (by_class == by_class[:, :1]).all()
    if order == "image_uniform":
        assert len(np.unique(found)) > 0.99 * length


@pytest.mark.parametrize("grouping", [False, True])
def test_a_million_rows_are_shuffled(grouping):
    groups = np.random.default_rng(0).integers(0, 5, 1_000_000)
    options = {"groups": groups} if grouping else {}
    sampler = Batches(SHUFFLE, groups, 1000, 0, 1, 0, **options)
    found = np.array(rows(sampler))
    assert len(np.unique(found)) == len(found) == sampler.steps * 1000
    if grouping:
        assert len(found) > 995_000
        assert (np.ptp(groups[found].reshape(-1, 1000), axis=1) == 0).all()


def test_a_million_rows_are_drawn_by_continent():
    rng = np.random.default_rng(0)
    names = np.array([name for name, _ in QUOTA] + [""], dtype=object)
    continents = names[rng.integers(0, 9, 1_000_000)]
    sampler = Batches(
        CONTINENT,
        np.zeros(1_000_000, int),
        1000,
        0,
        1,
        0,
        clean=rng.random(1_000_000) < 0.3,
        continents=continents,
    )
    times = pd.Series(continents[rows(sampler)]).value_counts()
    assert times.to_dict() == {name: round(1e6 * share) for name, share in QUOTA}
    assert sampler.unseen == (continents == "").sum()


def test_a_batch_that_does_not_split_is_refused():
    for order in ("shuffle", "pxk"):
        with pytest.raises(ValueError) as error:
            batches(Sampling(order), batch=6, world=4)
        assert str(error.value) == "a batch of 6 does not split over 4 processes"


def test_a_list_without_rows_is_refused():
    with pytest.raises(ValueError) as error:
        Batches(SHUFFLE, np.array([], int), 6, 0, 1, 0, name="list clean")
    assert str(error.value) == "list clean has no row to sample"


@pytest.mark.parametrize("column", ["clean", "continents", "groups"])
def test_a_column_of_another_length_is_refused(column):
    given = columns(10) | {column: columns(9)[column]}
    with pytest.raises(ValueError) as error:
        Batches(SHUFFLE, given.pop("labels"), 2, 0, 1, 0, **given)
    assert str(error.value) == f"the list: 9 {column}, 10 rows"


# Shuffle


@pytest.mark.parametrize(("length", "batch", "world"), CASES)
def test_an_epoch_has_every_row_once_and_fills_its_last_batch_from_its_start(
    length, batch, world
):
    steps = -(-length // batch)
    given = shuffled(length, batch, 0, 3, seed=5)
    assert len(given) == 3 * steps
    for epoch in range(3):
        part = given[epoch * steps : (epoch + 1) * steps]
        assert all(len(each) == batch for each in part)
        seen = rows(part)
        order = shuffle(length, np.random.default_rng((5, epoch))).tolist()
        assert seen == [order[place % length] for place in range(steps * batch)]
        assert sorted(seen[:length]) == list(range(length))
        ranks = [
            shuffled(length, batch, epoch, epoch + 1, 5, rank=rank, world=world)
            for rank in range(world)
        ]
        assert side_by_side(ranks) == part


def test_ranks_share_no_row_in_an_epoch_without_a_filled_batch():
    seen = [set(rows(shuffled(24, 6, 0, 1, 0, rank=r, world=3))) for r in range(3)]
    assert [len(each) for each in seen] == [8, 8, 8]
    assert set.union(*seen) == set(range(24))


def test_a_short_epoch_is_another_part_of_the_list_each_time():
    sampler = batches(replace(SHUFFLE, epoch_size=24), last=6)
    every = [set(rows(list(sampler)[at : at + 2])) for at in range(0, 12, 2)]
    assert {len(part) for part in every} == {24}
    assert len(set.union(*every)) > 48


# Aspect groups


@pytest.mark.parametrize("batch", [2, 6, 10])
def test_a_batch_has_rows_of_one_aspect_group(batch):
    groups = columns()["groups"]
    sampler = batches(SHUFFLE, batch=batch, last=3, grouped=True)
    assert sampler.per_epoch == sum(np.bincount(groups) // batch) > 0
    given = list(sampler)
    assert all(len({groups[row] for _, row in each}) == 1 for each in given)
    for epoch in range(3):
        part = rows(given[epoch * sampler.per_epoch : (epoch + 1) * sampler.per_epoch])
        assert len(set(part)) == len(part)
        expected = grouped(groups, batch, np.random.default_rng((0, epoch)))
        assert part == expected.tolist()


def test_a_group_smaller_than_a_batch_is_counted_and_never_seen():
    groups = np.array([0] * 7 + [2] * 3 + [4] * 4)
    sampler = Batches(SHUFFLE, groups, 4, 0, 20, 0, groups=groups)
    assert sampler.per_epoch == 2
    assert sampler.unseen == 3
    assert set(rows(sampler)) == set(range(7)) | set(range(10, 14))
    assert batches(SHUFFLE).unseen == 0


def test_groups_that_fill_no_batch_are_refused():
    groups = np.array([0] * 7 + [2] * 3)
    with pytest.raises(ValueError) as error:
        Batches(SHUFFLE, groups, 8, 0, 1, 0, groups=groups, name="list clean")
    assert str(error.value) == (
        "list clean: no aspect group fills a batch of 8 (rows by group: 0: 7, 2: 3)"
    )


@pytest.mark.parametrize("order", ["class_balanced", "image_uniform", "pxk"])
def test_another_order_does_not_group(order):
    with pytest.raises(ValueError) as error:
        batches(Sampling(order), grouped=True)
    assert str(error.value) == (
        f"order {order} cannot keep a batch in one aspect group: take order shuffle, or an "
        "input without template"
    )


# Classes


def test_class_balanced_batches_go_on_with_the_next_round():
    labels = columns()["labels"]
    sampler = batches(Sampling("class_balanced"), batch=4, last=1)
    seen = labels[rows(sampler)].tolist()
    assert sampler.per_epoch == 2
    assert sorted(seen[:7]) == list(range(7))


@pytest.mark.parametrize("order", ["class_balanced", "pxk"])
def test_a_long_epoch_does_not_repeat_its_beginning(order):
    sampler = batches(Sampling(order, epoch_size=240), last=1)
    seen = np.array(rows(sampler)).reshape(-1, 12)
    assert len(seen) == 20
    assert len({tuple(batch) for batch in seen.tolist()}) == 20


@pytest.mark.parametrize("order", ["image_uniform", "pxk"])
def test_a_batch_may_take_all_that_there_is(order):
    labels = np.repeat(np.arange(5), 4)
    (batch,) = Batches(Sampling(order), labels, 20, 0, 1, 0)
    assert sorted(row for _, row in batch) == list(range(20))


@pytest.mark.parametrize("order", ["image_uniform", "pxk"])
def test_a_batch_has_its_rows_of_each_class_side_by_side(order):
    labels = columns()["labels"]
    for batch in batches(Sampling(order, per_class=3)):
        each = labels[[row for _, row in batch]].reshape(4, 3)
        assert (each == each[:, :1]).all()
        if order == "pxk":
            assert len(set(each[:, 0])) == 4


def test_image_uniform_shows_nearly_every_row():
    sampler = batches(Sampling("image_uniform", per_class=3), batch=3, last=1)
    counts = np.bincount(columns()["labels"])
    assert sampler.per_epoch == sum(-(-counts // 3))
    assert set(rows(sampler)) == set(range(60))


@pytest.mark.parametrize(
    ("sampling", "batch", "words"),
    [
        (Sampling("pxk", 5), 12, "a batch of 12 does not split into 5 rows a class"),
        (
            Sampling("image_uniform", 5),
            12,
            "a batch of 12 does not split into 5 rows a class",
        ),
        (
            Sampling("pxk", 4),
            32,
            "list x: 7 classes do not fill a batch of 32, 4 rows a class",
        ),
        (
            Sampling("image_uniform", 30),
            240,
            "list x: 7 groups of 30 rows do not fill a batch of 240, 30 rows a class",
        ),
    ],
)
def test_a_batch_that_the_classes_do_not_make_is_refused(sampling, batch, words):
    with pytest.raises(ValueError) as error:
        batches(sampling, batch=batch, name="list x")
    assert str(error.value) == words


def test_rows_without_a_label_have_no_class():
    for order in ("class_balanced", "image_uniform", "pxk"):
        with pytest.raises(ValueError) as error:
            Batches(Sampling(order), np.array([0, -1, 3, -1]), 2, 0, 1, 0)
        assert str(error.value) == "the list: 2 rows have no label to sample by"


# Continents


def places(**counts):
    """Continents and trust: `Asia=(2, 3)` is two clean and three noisy rows of Asia."""
    table = [
        (name.replace("_", " "), clean)
        for name, (trusted, noisy) in counts.items()
        for clean in [True] * trusted + [False] * noisy
    ]
    return np.array([name for name, _ in table], dtype=object), np.array(
        [clean for _, clean in table]
    )


ALL = {
    name.replace(" ", "_"): (3, 2) for name, _ in QUOTA
}  # eight continents, five rows each


def drawn(sampling, counts, batch=1, last=1, **options):
    continents, clean = places(**counts)
    return Batches(
        sampling,
        np.zeros(len(clean), int),
        batch,
        0,
        last,
        0,
        clean=clean,
        continents=continents,
        **options,
    )


def tally(sampler, counts):
    """Rows by continent, clean and noisy, in the order of `counts`."""
    continents, clean = places(**counts)
    seen = rows(sampler)
    return [
        tuple(
            sum(continents[row] == name and clean[row] == kind for row in seen)
            for kind in (True, False)
        )
        for name in dict.fromkeys(continents)
    ]


def test_the_quota_of_a_hundred_rows_by_hand():
    sampling = replace(CONTINENT, epoch_size=100)
    assert tally(drawn(sampling, ALL), ALL) == [
        (33, 17),  # Asia
        (13, 7),  # Europe
        (10, 5),  # Africa
        (7, 3),  # North America
        (1, 1),  # South America
        (1, 0),  # Antarctica
        (1, 0),  # Oceania
        (1, 0),  # OTHER
    ]


def test_an_epoch_is_as_long_as_the_list_whatever_has_a_quota():
    counts = {"Asia": (4, 4), "Europe": (2, 2), "Mars": (3, 3), "_": (2, 0)}
    sampling = replace(CONTINENT, continents=TWO, clean_share=0.5)
    sampler = drawn(sampling, counts, last=50)
    assert sampler.per_epoch == 20 and sampler.unseen == 8
    # fifteen of Asia: eight clean, seven noisy; five of Europe: three and two
    assert tally(sampler, counts) == [(400, 350), (150, 100), (0, 0), (0, 0)]
    assert set(rows(sampler)) == set(range(12))


def test_a_quota_that_rounds_to_no_row_leaves_its_rows_unseen():
    sampler = drawn(replace(CONTINENT, epoch_size=10), ALL)
    assert tally(sampler, ALL)[3:] == [(1, 0)] + [(0, 0)] * 4
    assert sampler.unseen == 2 + 4 * 5


def test_the_last_batch_repeats_the_epochs_first_rows():
    sampling = replace(CONTINENT, continents=TWO)
    sampler = drawn(sampling, {"Asia": (4, 4), "Europe": (1, 1)}, batch=4)
    assert sampler.per_epoch == 3
    seen = rows(sampler)
    assert seen[10:] == seen[:2]
    assert sum(row >= 8 for row in seen[:10]) in (2, 3)


@pytest.mark.parametrize(
    ("lacking", "share", "kind"),
    [
        ((0, 0), 0.66, ""),
        ((0, 3), 0.66, "clean "),
        ((3, 0), 0.66, "noisy "),
        ((0, 3), 1.0, "clean "),
    ],
)
def test_an_empty_bucket_is_refused_by_name(lacking, share, kind):
    sampling = replace(CONTINENT, clean_share=share)
    with pytest.raises(ValueError) as error:
        drawn(sampling, ALL | {"Antarctica": lacking}, name="list all")
    assert str(error.value) == (
        f"list all: no {kind}row of Antarctica; set fill to give its quota to others, or "
        "change continents or clean_share"
    )


@pytest.mark.parametrize(("share", "lacking"), [(1.0, (3, 0)), (0.0, (0, 3))])
def test_a_kind_without_a_share_may_be_missing(share, lacking):
    counts = ALL | {"Europe": lacking}
    sampling = replace(CONTINENT, clean_share=share, epoch_size=100)
    found = tally(drawn(sampling, counts), counts)
    assert [sum(pair) for pair in found] == [50, 20, 15, 10, 2, 1, 1, 1]
    assert sum(pair[share == 1] for pair in found) == 0


def test_a_continent_without_a_share_may_be_missing():
    counts = {"Asia": (1, 1)}
    shares = (("Asia", 1.0), ("Europe", 0.0))
    sampler = drawn(replace(CONTINENT, continents=shares, epoch_size=50), counts)
    assert tally(sampler, counts) == [(33, 17)]


def test_fill_gives_an_empty_continents_quota_to_the_others_in_proportion():
    counts = {"Asia": (2, 2), "Africa": (2, 2), "North_America": (1, 1)}
    sampling = replace(CONTINENT, fill=True, epoch_size=150, clean_share=0.5)
    # of 0.5, 0.15 and 0.1: two thirds, a fifth, two fifteenths
    assert tally(drawn(sampling, counts), counts) == [(50, 50), (15, 15), (10, 10)]


def test_fill_gives_the_quota_of_a_missing_kind_to_the_other():
    counts = ALL | {"Asia": (3, 0), "Europe": (0, 3)}
    sampling = replace(CONTINENT, fill=True, epoch_size=100)
    found = tally(drawn(sampling, counts), counts)
    assert found[:3] == [(50, 0), (0, 20), (10, 5)]
    only_clean = replace(sampling, clean_share=1.0)
    assert tally(drawn(only_clean, counts), counts)[:3] == [(50, 0), (0, 20), (15, 0)]


def test_fill_without_any_continent_of_the_quota_is_refused():
    with pytest.raises(ValueError) as error:
        drawn(replace(CONTINENT, fill=True), {"Mars": (3, 3)}, name="list all")
    assert str(error.value) == "list all: no row of a continent that has a quota"


def test_a_list_without_continents_is_refused():
    for sampling in (CONTINENT, replace(CONTINENT, fill=True)):
        with pytest.raises(ValueError) as error:
            Batches(
                sampling,
                np.zeros(6, int),
                2,
                0,
                1,
                0,
                clean=np.ones(6, bool),
                continents=np.full(6, "", dtype=object),
                name="list all",
            )
        assert str(error.value) == (
            "list all has no continents: build it in 00_image_lists from data with countries "
            "and a table of their continents, or take another order"
        )


def test_continents_may_come_as_a_column_of_categories():
    continents, clean = places(**ALL)
    column = pd.Series(continents, index=range(7, 47)).astype("category")
    sampler = Batches(
        CONTINENT, np.zeros(40, int), 8, 0, 2, 0, clean=clean, continents=column
    )
    assert list(sampler) == list(drawn(CONTINENT, ALL, batch=8, last=2))


@pytest.mark.parametrize("column", ["clean", "continents"])
def test_a_missing_column_is_named(column):
    given = {k: columns()[k] for k in ("clean", "continents")}
    with pytest.raises(ValueError) as error:
        Batches(CONTINENT, columns()["labels"], 4, 0, 1, 0, **(given | {column: None}))
    assert str(error.value) == f"order continent needs the column {column} of the list"


# Configuration


def test_the_continents_are_those_of_the_published_system():
    assert Sampling().continents == (
        ("Asia", 0.5),
        ("Europe", 0.2),
        ("Africa", 0.15),
        ("North America", 0.1),
        ("South America", 0.02),
        ("Antarctica", 0.01),
        ("Oceania", 0.01),
        ("OTHER", 0.01),
    )


def test_a_sampling_survives_json():
    sampling = Sampling("pxk", 8, TWO, 0.5, True, 1000)
    assert config.from_dict(Sampling, json.loads(json.dumps(asdict(sampling)))) == (
        sampling
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"order": "random"},
            f"order 'random' is not one of {', '.join(ORDERS)}",
        ),
        ({"per_class": 0}, "per_class is 0, not at least 1"),
        ({"clean_share": 1.1}, "clean_share is 1.1, not at most 1"),
        ({"clean_share": -0.1}, "clean_share is -0.1, not at least 0"),
        ({"epoch_size": -1}, "epoch_size is -1, not at least 0"),
        ({"continents": (("Asia", 0.5), ("Asia", 0.5))}, "continents has Asia twice"),
        (
            {"continents": (("Asia", 1.5), ("Africa", -0.5))},
            "the shares of continents are not parts of 1: 1.5, -0.5",
        ),
        (
            {"continents": (("Asia", 0.5), ("Africa", 0.4))},
            "the shares of continents are not parts of 1: 0.5, 0.4",
        ),
        ({"continents": ()}, "the shares of continents are not parts of 1: "),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError) as error:
        Sampling(**fields)
    assert str(error.value) == words
