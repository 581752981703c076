import math
import random

import numpy as np
import pandas as pd
import pytest

from kit.answers.metrics import gap
from kit.data.tables import read_csv


def by_hand(predictions, truths):
    """GAP of one half; predictions: query -> (landmark, confidence), truths: query -> set."""
    rows = [
        (query, landmark, confidence)
        for query, (landmark, confidence) in predictions.items()
        if query in truths and landmark
    ]
    # three sorts, the last one counts most
    rows.sort(key=lambda row: row[1])
    rows.sort(key=lambda row: row[0])
    rows.sort(key=lambda row: row[2], reverse=True)
    total, right = 0.0, 0
    for place, (query, landmark, _) in enumerate(rows, start=1):
        if landmark in truths[query]:
            right += 1
            total += right / place
    return total / sum(1 for landmarks in truths.values() if landmarks)


def table(predictions):
    rows = [(query, *row) for query, row in predictions.items()]
    return pd.DataFrame(rows, columns=["id", "landmark", "confidence"])


def solution_of(truths, usage):
    rows = [
        (query, " ".join(sorted(landmarks)), usage[query])
        for query, landmarks in truths.items()
    ]
    return pd.DataFrame(rows, columns=["id", "landmarks", "usage"])


def drawn(seed, queries=200, levels=7):
    """Random predictions of few confidences, so that most are tied."""
    draw = random.Random(seed)
    truths, usage, predictions = {}, {}, {}
    for _ in range(queries):
        query = f"{draw.randrange(16**16):016x}"
        count = draw.choice([0, 0, 1, 1, 1, 2])
        truths[query] = {str(draw.randrange(9)) for _ in range(count)}
        usage[query] = draw.choice(["Public", "Private", "Private", "Ignored"])
        kind = draw.randrange(8)
        if kind:
            guess = sorted(truths[query])[:1] if kind < 5 else []
            landmark = guess[0] if guess else str(draw.randrange(9))
            confidence = draw.randrange(levels) / levels - 0.3
            predictions[query] = landmark if kind < 7 else "", confidence
    return predictions, truths, usage


def halves(truths, usage):
    return {
        half: {query: names for query, names in truths.items() if usage[query] == half}
        for half in ("Public", "Private")
    }


@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_gap_matches_its_definition_with_and_without_ties(seed, levels):
    predictions, truths, usage = drawn(seed, levels=levels)
    score = gap.evaluate(table(predictions), solution_of(truths, usage))
    parts = halves(truths, usage)
    assert score.public == pytest.approx(by_hand(predictions, parts["Public"]))
    assert score.private == pytest.approx(by_hand(predictions, parts["Private"]))
    assert 0 < score.public < 1 and 0 < score.private < 1
    for half, part in parts.items():
        right = sum(
            predictions.get(query, ("",))[0] in names for query, names in part.items()
        )
        assert score.accuracy[half] == right / sum(map(bool, part.values()))


def test_gap_by_hand():
    truths = {"a": {"1"}, "b": set(), "c": {"2", "3"}, "d": {"4"}}
    usage = dict.fromkeys(truths, "Private")
    predictions = {"a": ("1", 0.9), "b": ("1", 0.8), "c": ("3", 0.7)}
    score = gap.evaluate(table(predictions), solution_of(truths, usage))
    assert score.private == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert score.accuracy["Private"] == pytest.approx(2 / 3)
    assert math.isnan(score.public) and math.isnan(score.accuracy["Public"])
    assert str(score) == "private GAP 0.5556  public GAP (no query)"


def test_of_equally_sure_predictions_the_lower_query_comes_first():
    truths = {"b": {"1"}, "a": set()}
    usage = dict.fromkeys(truths, "Private")
    predictions = {"b": ("1", 0.5), "a": ("1", 0.5)}
    assert gap.evaluate(table(predictions), solution_of(truths, usage)).private == 0.5
    truths = {"b": set(), "a": {"1"}}
    assert gap.evaluate(table(predictions), solution_of(truths, usage)).private == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_does_not_matter(seed):
    predictions, truths, usage = drawn(seed)
    given, solution = table(predictions), solution_of(truths, usage)
    expected = gap.evaluate(given, solution)
    again = gap.evaluate(
        given.sample(frac=1, random_state=seed),
        solution.sample(frac=1, random_state=seed + 1),
    )
    assert (again.public, again.private) == (expected.public, expected.private)
    pd.testing.assert_frame_equal(
        gap.coverage(again, "Private"), gap.coverage(expected, "Private")
    )


def test_predictions_for_ignored_and_unknown_queries_do_not_count():
    predictions, truths, usage = drawn(3)
    expected = gap.evaluate(table(predictions), solution_of(truths, usage))
    counted = {
        query: row for query, row in predictions.items() if usage[query] != "Ignored"
    }
    counted["unknown"] = "1", 99.0
    again = gap.evaluate(table(counted), solution_of(truths, usage))
    assert len(counted) < len(predictions)
    assert (again.public, again.private) == (expected.public, expected.private)


def test_a_query_may_show_several_landmarks_and_each_is_right():
    truths = {"a": {"1", "22"}}
    for landmark, expected in (("1", 1), ("22", 1), ("2", 0), ("1 22", 0)):
        score = gap.evaluate(
            table({"a": (landmark, 0.5)}), solution_of(truths, {"a": "Public"})
        )
        assert score.public == expected


def test_average_keeps_ties_in_the_order_given():
    draw = np.random.default_rng(0)
    sure, right = draw.integers(3, size=300) / 4, draw.random(300) < 0.4
    ranked = sorted(range(300), key=lambda place: -sure[place])  # stable, by definition
    hits = np.cumsum(right[ranked])
    total = sum(
        hits[place] / (place + 1) for place in range(300) if right[ranked[place]]
    )
    assert gap.average(sure, right, 150) == pytest.approx(total / 150)
    backwards = gap.average(sure[::-1], right[::-1], 150)
    assert abs(backwards - total / 150) > 1e-3


def test_gap_without_queries_that_show_a_landmark_is_not_a_number():
    assert math.isnan(gap.average(np.array([0.5]), np.array([False]), 0))
    assert gap.average(np.zeros(0), np.zeros(0, bool), 3) == 0


@pytest.mark.parametrize(
    ("truths", "halves"),
    [
        ({"a": {"1"}, "b": set()}, {"Public"}),
        ({"a": set(), "b": {"1"}}, {"Private"}),
        ({"a": set(), "b": set()}, set()),
    ],
)
def test_a_half_whose_queries_show_no_landmark_must_have_no_gap(truths, halves):
    solution = solution_of(truths, {"a": "Public", "b": "Private"})
    score = gap.evaluate(table({"a": ("1", 0.5), "b": ("1", 0.2)}), solution)
    for half, value in zip(gap.HALVES, (score.public, score.private), strict=True):
        assert gap.any_landmark(solution, half) == (half in halves)
        assert math.isnan(value) == (half not in halves)
    assert gap.any_landmark(solution) == bool(halves)
    assert ("not defined" in str(score)) == (not halves)


def test_no_prediction_at_all_scores_nothing():
    truths = {"a": {"1"}}
    score = gap.evaluate(table({}), solution_of(truths, {"a": "Private"}))
    assert score.private == 0 and score.accuracy["Private"] == 0
    assert len(gap.coverage(score, "Private")) == 0


def test_coverage_tells_what_the_surest_predictions_are_worth():
    truths = {"a": {"1"}, "b": set(), "c": {"2"}, "d": {"4"}, "e": {"5"}}
    usage = dict.fromkeys(truths, "Private") | {"e": "Public"}
    predictions = {"a": ("1", 0.7), "b": ("1", 0.8), "c": ("2", 0.7), "e": ("5", 9.0)}
    score = gap.evaluate(table(predictions), solution_of(truths, usage))
    found = gap.coverage(score, "Private")
    assert found["confidence"].tolist() == [0.8, 0.7, 0.7]
    assert found["share"].tolist() == [1 / 4, 2 / 4, 3 / 4]
    np.testing.assert_allclose(found["precision"], [0, 1 / 2, 2 / 3])
    np.testing.assert_allclose(found["recall"], [0, 1 / 3, 2 / 3])


@pytest.mark.parametrize("half", ["Public", "Private"])
def test_coverage_matches_its_definition(half):
    predictions, truths, usage = drawn(11)
    score = gap.evaluate(table(predictions), solution_of(truths, usage))
    found = gap.coverage(score, half)
    part = halves(truths, usage)[half]
    answered = sorted(
        (-predictions[query][1], query)
        for query in part
        if predictions.get(query, ("", 0))[0]
    )
    assert len(found) == len(answered)
    positives = sum(map(bool, part.values()))
    for count, row in enumerate(found.itertuples(), start=1):
        surest = [query for _, query in answered[:count]]
        right = sum(predictions[query][0] in part[query] for query in surest)
        assert row.confidence == -answered[count - 1][0]
        assert row.share == count / len(part)
        assert row.precision == pytest.approx(right / count)
        assert row.recall == pytest.approx(right / positives)


def test_the_sum_of_precisions_at_the_right_ones_over_the_positives_is_the_curve():
    predictions, truths, usage = drawn(5)
    score = gap.evaluate(table(predictions), solution_of(truths, usage))
    curve = gap.coverage(score, "Private")
    steps = np.diff(curve["recall"], prepend=0)
    assert score.private == pytest.approx((curve["precision"] * steps).sum())


def test_every_query_that_counts_has_a_row():
    predictions, truths, usage = drawn(6)
    solution = solution_of(truths, usage)
    queries = gap.evaluate(table(predictions), solution).queries
    asked = solution[solution["usage"] != "Ignored"]
    assert queries["id"].tolist() == asked["id"].tolist()
    assert queries["truth"].tolist() == asked["landmarks"].tolist()
    for row in queries.itertuples():
        landmark, confidence = predictions.get(row.id, ("", 0))
        assert row.landmark == landmark
        assert math.isnan(row.confidence) if not landmark else row.confidence
        assert row.correct == (landmark in truths[row.id])
        assert row.usage == usage[row.id]
        assert not landmark or row.confidence == confidence


def test_inputs_are_not_modified():
    predictions, truths, usage = drawn(7)
    given, solution = table(predictions), solution_of(truths, usage)
    before = given.copy(), solution.copy()
    gap.coverage(gap.evaluate(given, solution), "Public")
    pd.testing.assert_frame_equal(given, before[0])
    pd.testing.assert_frame_equal(solution, before[1])


def test_two_predictions_of_a_query_are_refused():
    twice = pd.concat([table({"a": ("1", 0.5)}), table({"a": ("2", 0.4)})])
    with pytest.raises(ValueError, match="^query a has more than one prediction$"):
        gap.evaluate(twice, solution_of({"a": {"1"}}, {"a": "Public"}))


def test_a_confidence_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="confidence of query a is not a number"):
        gap.evaluate(
            table({"a": ("1", math.nan)}), solution_of({"a": {"1"}}, {"a": "Public"})
        )


def test_gap_of_the_real_solution_matches_its_definition(photos):
    path = photos / "packages" / "test" / "recognition_solution_v2.1.csv"
    solution = read_csv(path, ("id", "landmarks", "Usage"))
    solution = solution.rename(columns={"Usage": "usage"})
    draw = random.Random(0)
    names = sorted(set(solution["landmarks"]) - {""})
    truths = {row.id: set(row.landmarks.split()) for row in solution.itertuples()}
    predictions = {
        query: (draw.choice([*truth, draw.choice(names)]), draw.randrange(20) / 20)
        for query, truth in truths.items()
    }
    usage = dict(zip(solution["id"], solution["usage"], strict=True))
    score = gap.evaluate(table(predictions), solution)
    for half, part in halves(truths, usage).items():
        expected = by_hand(predictions, part)
        assert getattr(score, half.lower()) == pytest.approx(expected)
        assert 0 < expected < 1
