import math
import random

import numpy as np
import pandas as pd
import pytest

from kit.answers.metrics import __main__ as command_line
from kit.answers.metrics import mean_ap
from kit.answers.metrics.mean_ap import (
    Score,
    average_precision,
    evaluate,
    evaluate_file,
)


def by_hand(ranking: list[str], positives: set[str]) -> float:
    """AP@100 of one query as the competition defines it, one place after another."""
    total, hits, seen = 0.0, 0, set()
    for place, image in enumerate(ranking[:100], start=1):
        if image in positives and image not in seen:
            hits += 1
            total += hits / place
        seen.add(image)
    return total / min(len(positives), 100)


def solution_of(**rows: tuple[str, str]) -> pd.DataFrame:
    """id -> (images, usage), as `read_solution` gives it."""
    return pd.DataFrame(
        [(name, *row) for name, row in rows.items()], columns=["id", "images", "usage"]
    )


def ap_of(score: Score) -> dict[str, float]:
    return dict(zip(score.queries["id"], score.queries["ap"], strict=True))


# Average precision


def test_average_precision_is_the_mean_precision_at_the_hits():  # worked by hand
    hits = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    found = average_precision(hits, np.array([2, 1, 3, 4]))
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, 1 / 4, 0, 1])


def test_more_positives_than_places_count_as_many_as_there_are_places():
    hits = np.array([[1, 1, 0], [1, 1, 1]], bool)
    found = average_precision(hits, np.array([50, 50]))
    np.testing.assert_allclose(found, [2 / 3, 1])


@pytest.mark.parametrize(("positives", "divisor"), [(99, 99), (100, 100), (250, 100)])
def test_the_sum_is_divided_by_the_positives_but_at_most_100(positives, divisor):
    images = [f"p{number}" for number in range(positives)]
    solution = solution_of(q=(" ".join(images), "Private"))
    assert evaluate(["q"], np.array([images]), solution).private == 1
    few = evaluate(["q"], np.array([images[:7]]), solution)
    assert few.private == pytest.approx(7 / divisor)


# evaluate


@pytest.fixture
def answered():
    """60 queries with random rankings: repeats, gaps, many positives, some not in the index."""
    draw = random.Random(0)
    index = [f"{number:016x}" for number in range(400)]
    absent = [f"absent{number}" for number in range(50)]
    rows, rankings = {}, {}
    for number in range(60):
        name = f"{number:03}e{draw.randrange(10**12):012}"
        size = draw.choice([1, 2, 5, 30, 120, 250])
        positives = draw.sample(index, size) + draw.sample(absent, draw.randrange(3))
        usage = ["Public", "Private", "Ignored"][number % 3]
        rows[name] = ("" if usage == "Ignored" else " ".join(positives), usage)
        ranking = draw.choices(index + positives * 3 + ["", ""], k=130)
        rankings[name] = ranking
    assert sum(len(set(ranking)) < 130 for ranking in rankings.values()) == 60
    return rankings, solution_of(**rows)


def arranged(rankings, order=None):
    names = list(rankings) if order is None else order
    return names, np.array([rankings[name] for name in names])


@pytest.mark.parametrize("width", [1, 30, 99, 100, 101, 130])
def test_evaluate_matches_the_definition(answered, width):
    rankings, solution = answered
    cut = {name: ranking[:width] for name, ranking in rankings.items()}
    score = evaluate(*arranged(cut), solution)
    halves = {"Public": [], "Private": []}
    for name, images, usage in solution.itertuples(index=False):
        if usage != "Ignored":
            positives = set(images.split())
            halves[usage].append((name, by_hand(cut[name], positives), len(positives)))
    expected = sorted(halves["Public"] + halves["Private"])
    found = score.queries.sort_values("id")
    assert found["id"].tolist() == [name for name, _, _ in expected]
    np.testing.assert_allclose(found["ap"], [ap for _, ap, _ in expected])
    assert found["positives"].tolist() == [count for _, _, count in expected]
    for half, value in (("Public", score.public), ("Private", score.private)):
        mean = sum(ap for _, ap, _ in halves[half]) / len(halves[half])
        assert value == pytest.approx(mean)
        assert 0 < value < 1


def test_the_order_of_queries_and_of_the_solution_does_not_matter(answered):
    rankings, solution = answered
    expected = evaluate(*arranged(rankings), solution)
    shuffled = random.Random(1).sample(list(rankings), len(rankings))
    again = evaluate(
        *arranged(rankings, shuffled), solution.sample(frac=1, random_state=1)
    )
    assert again.public == pytest.approx(expected.public)
    assert again.private == pytest.approx(expected.private)
    assert ap_of(again) == pytest.approx(ap_of(expected))


def test_answers_to_ignored_and_unknown_queries_do_not_count(answered):
    rankings, solution = answered
    expected = evaluate(*arranged(rankings), solution)
    asked = solution[solution["usage"] != "Ignored"]
    needed = {name: rankings[name] for name in asked["id"]}
    assert ap_of(evaluate(*arranged(needed), solution)) == ap_of(expected)
    more = needed | {"unknown": rankings[asked["id"].iloc[0]]}
    assert ap_of(evaluate(*arranged(more), solution)) == ap_of(expected)


def test_an_image_that_is_answered_twice_counts_once_at_its_better_place():
    solution = solution_of(q=("a b", "Public"))
    ranked = np.array([["a", "a", "a", "b"]])
    assert evaluate(["q"], ranked, solution).public == pytest.approx((1 + 2 / 4) / 2)


def test_a_positive_of_one_query_is_none_of_another():
    solution = solution_of(q=("a", "Public"), r=("b", "Public"), s=("c", "Private"))
    ranked = np.array([["b", "c"], ["a", "b"], ["c", "a"]])
    score = evaluate(["q", "r", "s"], ranked, solution)
    assert ap_of(score) == {"q": 0, "r": 0.5, "s": 1}
    assert (score.public, score.private) == (0.25, 1)


def test_a_half_without_queries_is_not_a_number():
    score = evaluate(["q"], np.array([["a"]]), solution_of(q=("a", "Private")))
    assert math.isnan(score.public) and score.private == 1


@pytest.mark.filterwarnings("error")
def test_a_query_without_positives_does_not_change_the_others():
    solution = solution_of(q=("a", "Public"), r=("", "Public"), s=("b", "Public"))
    ranked = np.array([["b", "a"], ["a", "b"], ["b", "a"]])
    score = ap_of(evaluate(["q", "r", "s"], ranked, solution))
    assert (score["q"], score["s"]) == (0.5, 1)


def test_places_that_are_left_empty_are_no_hits():
    solution = solution_of(q=("0 1", "Public"))
    assert evaluate(["q"], np.array([["1"]]), solution).public == 0.5
    assert evaluate(["q"], np.array([["1", ""]]), solution).public == 0.5


def test_a_query_that_has_no_answer_is_refused(answered):
    rankings, solution = answered
    asked = solution.loc[solution["usage"] != "Ignored", "id"]
    del rankings[asked.iloc[3]], rankings[asked.iloc[9]]
    message = f"^query {asked.iloc[3]} of the solution has no answer \\(2 missing\\)$"
    with pytest.raises(ValueError, match=message):
        evaluate(*arranged(rankings), solution)


def test_evaluate_leaves_its_inputs_as_they_were(answered):
    rankings, solution = answered
    names, ranked = arranged(rankings)
    before = ranked.copy(), solution.copy()
    evaluate(names, ranked, solution)
    assert np.array_equal(ranked, before[0])
    pd.testing.assert_frame_equal(solution, before[1])


# Files and the command


@pytest.fixture
def pair(tmp_path, answered):
    """submission.csv and solution.csv of the random rankings."""
    rankings, solution = answered
    rows = [f"{name},{' '.join(images).strip()}" for name, images in rankings.items()]
    (tmp_path / "submission.csv").write_text("\n".join(["id,images", *rows]) + "\n")
    table = solution.rename(columns={"usage": "Usage"})
    table.loc[table["Usage"] == "Ignored", "images"] = "None"
    table.to_csv(tmp_path / "solution.csv", index=False)
    return tmp_path / "submission.csv", tmp_path / "solution.csv"


def test_a_file_scores_what_its_rankings_score(pair, answered):
    rankings, solution = answered
    packed = {  # a submission has no gaps
        name: [image for image in images if image] for name, images in rankings.items()
    }
    score = ap_of(evaluate_file(*pair))
    for name, images, usage in solution.itertuples(index=False):
        if usage != "Ignored":
            expected = by_hand(packed[name], set(images.split()))
            assert score[name] == pytest.approx(expected)


def test_a_query_without_an_answer_in_the_file_scores_nothing(tmp_path):
    (tmp_path / "submission.csv").write_text("id,images\nq,\nr,a\n")
    (tmp_path / "solution.csv").write_text("id,images,Usage\nq,a,Public\nr,a,Public\n")
    score = evaluate_file(tmp_path / "submission.csv", tmp_path / "solution.csv")
    assert ap_of(score) == {"q": 0, "r": 1}


def test_the_line_has_four_digits():
    line = str(Score(public=1.0, private=0.12345678, queries=pd.DataFrame()))
    assert line == "private mAP@100 0.1235  public mAP@100 1.0000"


HEAD = "id,images,Usage\n"


@pytest.mark.parametrize(
    ("submitted", "solution", "message"),
    [
        ("id,images\n", HEAD + "q,a,Public\n", "query q of the solution has no answer"),
        (
            "id,images\nq,a\nq,b\n",
            HEAD + "q,a,Public\n",
            "'q' stands there more than once",
        ),
        (
            "id,image\nq,a\n",
            HEAD + "q,a,Public\n",
            "no column images; it has id, image",
        ),
        ("", HEAD + "q,a,Public\n", "not a CSV file"),
        ('id,images\n"q,a', HEAD + "q,a,Public\n", "not a CSV file"),
        ("id,images\nq,a\n", "id,images\nq,a\n", "no column Usage"),
        ("id,images\nq,a\n", HEAD + "q,a,public\n", "Usage 'public' is not Public"),
        ("id,images\nq,a\n", HEAD + "q,a,Public\nq,b,Public\n", "more than once"),
    ],
    ids=[
        "no answers",
        "query twice",
        "no images",
        "empty",
        "open quote",
        "no usage",
        "strange usage",
        "solution twice",
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, submitted, solution, message):
    (tmp_path / "submission.csv").write_text(submitted)
    (tmp_path / "solution.csv").write_text(solution)
    with pytest.raises(SystemExit) as caught:
        command_line.main(
            [
                "submission",
                str(tmp_path / "submission.csv"),
                str(tmp_path / "solution.csv"),
            ]
        )
    said = caught.value.code
    assert isinstance(said, str) and "\n" not in said  # a text is exit status 1
    assert said.startswith("metrics: ") and message in said


# How sure a gain is


def scored(ap, landmarks, usage):
    """A score of queries that were not ranked."""
    queries = pd.DataFrame(
        {
            "id": [f"q{n}" for n in range(len(ap))],
            "usage": usage,
            "positives": 1,
            "landmark": landmarks,
            "ap": ap,
        }
    )
    return Score(0.0, 0.0, queries)


def test_a_gain_is_the_mean_and_its_interval_that_of_redrawn_landmarks():
    random = np.random.default_rng(0)
    landmarks = random.integers(0, 12, 80)
    usage = np.where(random.random(80) < 0.3, "Public", "Private")
    before, after = random.random(80), random.random(80)
    found = mean_ap.gain(
        scored(before, landmarks, usage), scored(after, landmarks, usage), draws=300
    )
    private = usage == "Private"
    owners = sorted(set(landmarks[private]))
    means = []
    drawn = np.random.default_rng(0).integers(len(owners), size=(300, len(owners)))
    for row in drawn:
        some = []
        for place in row:
            of_it = private & (landmarks == owners[place])
            some += (after - before)[of_it].tolist()
        means.append(sum(some) / len(some))
    assert found.mean == pytest.approx((after - before)[private].mean())
    assert found.low == pytest.approx(np.quantile(means, 0.025))
    assert found.high == pytest.approx(np.quantile(means, 0.975))
    assert found.low < found.mean < found.high


def test_queries_of_one_landmark_are_no_more_sure_than_one():
    gains = np.repeat([0.5, -0.5], 40)
    usage, zero = ["Private"] * 80, np.zeros(80)
    by_landmark, by_query = (
        mean_ap.gain(scored(zero, owners, usage), scored(gains, owners, usage))
        for owners in (np.repeat([0, 1], 40), np.arange(80))
    )
    assert (by_landmark.low, by_landmark.high) == (-0.5, 0.5)
    assert by_query.high < 0.15
    assert str(by_landmark) == "+0.0000 [-0.5000, +0.5000]"


def test_each_landmark_can_count_the_same_however_many_queries_it_has():
    gains = np.array([0.4, 0.4, 0.4, 0.0, -0.2, -0.4])
    owners, usage = [0, 0, 0, 1, 2, 2], ["Private"] * 6
    pair = scored(np.zeros(6), owners, usage), scored(gains, owners, usage)
    found = mean_ap.gain(*pair, draws=300, per_landmark=True)
    own = np.array([0.4, 0.0, -0.3])  # of each landmark
    assert found.mean == pytest.approx(own.mean())
    drawn = np.random.default_rng(0).integers(3, size=(300, 3))
    low, high = np.quantile(own[drawn].mean(axis=1), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high))
    assert mean_ap.gain(*pair).mean == pytest.approx(0.1)


def test_gains_of_different_queries_or_of_none_are_refused():
    one = scored(np.zeros(3), np.arange(3), ["Private"] * 3)
    with pytest.raises(ValueError, match="two scores of the same queries"):
        mean_ap.gain(one, scored(np.zeros(2), np.arange(2), ["Private"] * 2))
    with pytest.raises(ValueError, match="no query is of the half Public"):
        mean_ap.gain(one, one, "Public")


def test_queries_with_the_same_positives_are_of_one_landmark():
    solution = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d"],
            "images": ["x y", "z", "x y", "y"],
            "usage": ["Private", "Public", "Ignored", "Private"],
        }
    )
    found = evaluate(["a", "b", "c", "d"], np.full((4, 1), "x"), solution)
    assert found.queries["landmark"].tolist() == [0, 1, 2]
    solution["images"] = ["x y", "z", "x y", "x y"]
    found = evaluate(["a", "b", "c", "d"], np.full((4, 1), "x"), solution)
    assert found.queries["landmark"].tolist() == [0, 1, 0]
