import math
import random

import numpy as np
import pandas as pd
import pytest

from kit.answers.metrics import definitions, mean_ap

PLACES = (1, 5, 10, 20, 100)


def drawn(seed=0, queries=80, k=100):
    """Random hits, some without any, and positives of which some lie below the ranking."""
    draw = np.random.default_rng(seed)
    hits = draw.random((queries, k)) < draw.choice([0, 0.02, 0.2, 0.7], (queries, 1))
    more = draw.choice([0, 0, 1, 7, 200], queries)
    return hits, np.maximum(hits.sum(axis=1) + more, 1)


def places_of(row):
    """0-based places of the hits."""
    return [place for place, hit in enumerate(row) if hit]


def official(row, positives):
    found = places_of(row)
    total = sum((n + 1) / (place + 1) for n, place in enumerate(found))
    return total / min(positives, 100)


def of_2021(row, positives):
    found = places_of(row)
    return sum((n + 1) / (place + 1) for n, place in enumerate(found)) / positives


def philbin(row, positives):
    """Corner after corner of the curve; precision is 1 where nothing has been retrieved."""
    area, old_recall, old_precision, right = 0.0, 0.0, 1.0, 0
    for place, hit in enumerate(row):
        right += bool(hit)
        recall, precision = right / positives, right / (place + 1)
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return area


def voc_2007(row, positives):
    curve, right = [], 0
    for place, hit in enumerate(row):
        right += bool(hit)
        curve.append((right / positives, right / (place + 1)))
    total = 0.0
    for tenth in range(11):
        total += max((p for r, p in curve if r >= tenth / 10), default=0.0)
    return total / 11


def voc_2010(row, positives):
    area = 0.0
    found = places_of(row)
    precisions = [(n + 1) / (place + 1) for n, place in enumerate(found)]
    for n in range(len(found)):
        area += max(precisions[n:]) / positives
    return area


def mean_precision(row, k):
    found = [place + 1 for place in places_of(row)]
    at = min(max(found), k) if found else k
    return sum(place <= at for place in found) / at


SLOW = {
    "mAP@100, official: precisions at hits / min(positives, 100)": official,
    "mAP@100, 2nd place 2021: precisions at hits / all positives": of_2021,
    "mAP@100, trapezoid (Oxford and Paris)": philbin,
    "mAP@100, VOC 2007: 11 points": voc_2007,
    "mAP@100, VOC 2010: area": voc_2010,
    "mP@5, revisited: k at most the last hit's place": lambda row, _: mean_precision(
        row, 5
    ),
}
for at in PLACES:
    SLOW[f"CMC@{at}: any hit in {at}"] = lambda row, _, k=at: any(row[:k])
    SLOW[f"precision@{at}: hits in {at} / {at}"] = lambda row, _, k=at: (
        len(places_of(row[:k])) / k
    )
    SLOW[f"recall@{at}: hits in {at} / all positives"] = lambda row, positives, k=at: (
        len(places_of(row[:k])) / positives
    )


def test_every_definition_has_a_transcription():
    assert set(SLOW) == set(definitions.DEFINITIONS)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("seed", range(3))
def test_a_definition_matches_its_transcription(name, seed):
    hits, positives = drawn(seed)
    found = definitions.DEFINITIONS[name](hits, positives)
    expected = [SLOW[name](*pair) for pair in zip(hits, positives, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("name", SLOW)
def test_a_perfect_ranking_is_worth_1_by_every_definition_that_can_reach_it(name):
    hits = np.zeros((1, 100), bool)
    hits[0, :100] = True
    found = definitions.DEFINITIONS[name](hits, np.array([100]))[0]
    limited = name.startswith("recall@") and "100" not in name
    assert found == pytest.approx(SLOW[name](hits[0], 100) if limited else 1)


@pytest.mark.parametrize("name", SLOW)
def test_a_ranking_without_hits_is_worth_nothing(name):
    found = definitions.DEFINITIONS[name](np.zeros((2, 100), bool), np.array([1, 300]))
    assert found.tolist() == [0, 0]


def test_all_by_hand():
    """Positives at places 1 and 4, a third one not found."""
    hits = np.zeros((1, 100), bool)
    hits[0, [0, 3]] = True
    positives = np.array([3])
    assert definitions.over_all(hits, positives)[0] == pytest.approx((1 + 1 / 2) / 3)
    expected = (1 + (1 / 3 + 2 / 4) / 2) / 3
    assert definitions.trapezoid(hits, positives)[0] == pytest.approx(expected)
    # precision 1 up to recall 1/3, then 1/2 up to 2/3: points 0-0.3 and 0.4-0.6
    assert definitions.voc_2007(hits, positives)[0] == pytest.approx((4 + 3 / 2) / 11)
    assert definitions.voc_2010(hits, positives)[0] == pytest.approx((1 + 1 / 2) / 3)
    assert definitions.mean_precision(5)(hits, positives)[0] == 2 / 4
    assert definitions.precision(5)(hits, positives)[0] == 2 / 5
    assert definitions.recall(1)(hits, positives)[0] == pytest.approx(1 / 3)


def test_more_positives_than_places_divide_only_the_scale_of_2021():
    hits = np.ones((1, 100), bool)
    assert mean_ap.average_precision(hits, np.array([400]))[0] == pytest.approx(1)
    assert definitions.over_all(hits, np.array([400]))[0] == pytest.approx(1 / 4)


@pytest.fixture
def answered():
    draw = random.Random(0)
    index = [f"{number:04x}" for number in range(300)]
    rows, rankings = [], []
    for number in range(50):
        usage = ["Public", "Private", "Private", "Ignored"][number % 4]
        positives = draw.sample(index, draw.choice([1, 3, 40, 150]))
        images = "" if usage == "Ignored" else " ".join(positives)
        rows.append((f"q{number}", images, usage))
        rankings.append(draw.sample(index, 130))
    solution = pd.DataFrame(rows, columns=["id", "images", "usage"])
    return [row[0] for row in rows], np.array(rankings), solution


def test_the_table_has_the_mean_of_each_half(answered):
    names, ranked, solution = answered
    table = definitions.evaluate(names, ranked, solution)
    assert table["definition"].tolist() == list(definitions.DEFINITIONS)
    for half, column in (("Public", "public"), ("Private", "private")):
        for name, found in zip(table["definition"], table[column], strict=True):
            values = [
                SLOW[name](np.isin(ranked[n, :100], row.images.split()), positives)
                for n, row in enumerate(solution.itertuples())
                for positives in [len(row.images.split())]
                if row.usage == half
            ]
            assert found == pytest.approx(np.mean(values)), name
    score = mean_ap.evaluate(names, ranked, solution)
    assert table["public"][0] == score.public
    assert table["private"][0] == score.private


def test_a_query_without_positives_counts_nowhere(answered):
    names, ranked, solution = answered
    expected = definitions.evaluate(names, ranked, solution)
    more = pd.DataFrame([("empty", "", "Private")], columns=solution.columns)
    found = definitions.evaluate(
        [*names, "empty"],
        np.vstack([ranked, ranked[:1]]),
        pd.concat([solution, more], ignore_index=True),
    )
    pd.testing.assert_frame_equal(found, expected)


def test_a_half_without_queries_is_not_a_number(answered):
    names, ranked, solution = answered
    public = solution.assign(usage=solution["usage"].replace("Private", "Ignored"))
    found = definitions.evaluate(names, ranked, public)
    assert found["private"].isna().all() and found["public"].notna().all()


def test_each_line_tells_its_definition():
    table = pd.DataFrame(
        [("CMC@1: any hit in 1", 0.25, math.nan), ("mAP", 1.0, 0.5)],
        columns=["definition", "public", "private"],
    )
    assert definitions.show(table) == (
        "private (no query)  public 0.2500  CMC@1: any hit in 1\n"
        "private 0.5000  public 1.0000  mAP"
    )


def test_inputs_are_not_modified(answered):
    names, ranked, solution = answered
    before = ranked.copy(), solution.copy()
    definitions.evaluate(names, ranked, solution)
    assert np.array_equal(ranked, before[0])
    pd.testing.assert_frame_equal(solution, before[1])
    hits, positives = drawn()
    kept = hits.copy(), positives.copy()
    for measure in definitions.DEFINITIONS.values():
        measure(hits, positives)
    assert np.array_equal(hits, kept[0]) and np.array_equal(positives, kept[1])


@pytest.mark.parametrize(
    ("private", "public", "line"),
    [
        (0.25, 1.0, "private 0.2500  public 1.0000"),
        (0.25, math.nan, "private 0.2500  public (no query)"),
        (math.nan, 1.0, "private (no query)  public 1.0000"),
    ],
)
def test_a_half_without_queries_must_be_named_and_have_no_number(private, public, line):
    assert definitions.show_halves(private, public) == line
