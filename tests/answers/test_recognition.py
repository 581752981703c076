"""Recognition from stores on disk, against a dense and slow transcription of every step."""

from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from kit import files
from kit.answers import distractors, recognition
from kit.answers.metrics import gap
from kit.answers.pairs import Pairs
from kit.answers.recognition import Recognition
from kit.data import lists
from kit.data.inputs import InputSpec
from kit.features import store
from kit.features.views import Views
from kit.rerank import recogniser
from kit.rerank.local import verification
from kit.rerank.recogniser import (
    Background,
    Frequent,
    Inliers,
    NonLandmark,
    Probability,
    Recogniser,
    Vote,
)

COUNTS = {"query": 17, "index": 30, "refs": 41}
LOST = {"query": (3,), "index": (2, 28), "refs": (0, 7)}  # could not be read
MODELS = ("one", "two")
DIM = 6


def write(folder, name, rows):
    """A list as kit.data.lists writes it."""
    table = pd.DataFrame(rows)
    for column, empty in zip(
        lists.COLUMNS, ("", "", "-1", -1, 0, "", "", -1, -1), strict=True
    ):
        if column not in table:
            table[column] = empty
    folder.mkdir(parents=True, exist_ok=True)
    table[list(lists.COLUMNS)].to_csv(folder / f"{name}.csv", index=False)
    path = folder / f"{name}.csv"
    lists.describe_file(path, {"name": name, "rows": len(table)})


def features(folder, images, model, vectors):
    """A store as extraction writes it; rows of LOST are zero."""
    about = {
        "model": {"name": model, "hash": model * 16},
        "list": {"name": images.name, "hash": images.hash},
        "seen": {"f" * 64: "clean"},
        **Views().facts(InputSpec(size=32)),
    }
    ids = pd.unique(images.rows["id"]).astype("U16")
    store.create(folder / model / images.name, ids, DIM, 64, about)
    store.Writer(folder / model / images.name).write(0, vectors)
    store.finish(folder / model / images.name)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Lists query, index and refs, and coarse features of two models: many ties."""
    folder = tmp_path_factory.mktemp("work")
    random = np.random.default_rng(0)
    rows = {}
    for name, count in COUNTS.items():
        ids = [f"{name[0].encode().hex()}{number:014x}" for number in range(count)]
        rows[name] = {"id": ids, "path": [f"{name}/{i}.png" for i in ids]}
    labels = random.integers(0, 5, COUNTS["refs"])
    labels[:5] = np.arange(5)  # train knows every landmark first
    named = np.char.mod("%d", labels * 1000 + 7).astype(object)
    named[-6:] = "index"  # as index images have numbers of their own
    rows["refs"] |= {"label": labels, "landmark_id": named}
    rows["index"]["label"] = random.integers(-1, 2, COUNTS["index"])
    rows["query"]["label"] = -1
    for name, table in rows.items():
        write(folder / "lists", name, table)
    for model in MODELS:
        for name in rows:
            images = lists.load(folder / "lists", name)
            vectors = random.integers(-2, 3, (COUNTS[name], DIM)) + 0.5
            vectors[1::4] = vectors[: len(vectors[1::4])]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors[list(LOST[name])] = 0
            features(folder / "features", images, model, vectors)
    return folder


SOLUTION = pd.DataFrame(
    {
        "id": [f"{b'q'.hex()}{number:014x}" for number in range(17)],
        "landmarks": ["7", "", "1007", "", "2007 7", "", "", "4007"] * 2 + ["7"],
        "usage": (["Public"] * 2 + ["Private"]) * 5 + ["Ignored", "Public"],
    }
)


def opened(work, reference="refs", **options):
    query, refs = (lists.load(work / "lists", name) for name in ("query", reference))
    options = {"lists_folder": work / "lists", "solution": SOLUTION} | options
    return Recognition(work / "features", query, refs, **options)


# The slow way: dense, in float64, one query after the other


class Slow:
    def __init__(self, work, models):
        self.models = models
        self.labels = lists.load(work / "lists", "refs").labels
        self.names = recognition.landmarks(lists.load(work / "lists", "refs"))
        self.stores = {
            (model, name): store.load(work / "features" / model / name)
            for model in models
            for name in COUNTS
        }
        index = lists.load(work / "lists", "index")
        self.distractors = [
            row
            for row in range(COUNTS["index"])
            if index.labels[row] < 0 and row not in LOST["index"]
        ]

    def cosines(self, of, among, models):
        whole = sum(models.values())
        parts = [
            weight
            * self.stores[m, of].vectors.astype(np.float64)
            @ self.stores[m, among].vectors.astype(np.float64).T
            for m, weight in models.items()
        ]
        return sum(parts) / whole

    def near(self, of, step, count, models):
        """Mean cosine to the nearest distractors."""
        found = self.cosines(of, "index", models)[:, self.distractors]
        return np.sort(found, axis=1)[:, ::-1][:, :count].mean(axis=1)

    def sure(self, q, plan, searches):
        """Label and confidence of one query before the steps of the batch."""
        vote, penalty = plan.step("vote"), plan.step("non_landmark")
        background = plan.step("background")
        said, seen = [], []
        for models, share in searches:
            cosines = self.cosines("query", "refs", models)[q]
            less = np.zeros(len(cosines))
            if penalty:
                near = self.near("refs", penalty, penalty.reference_near, models)
                less = penalty.references * near
            order = [
                row
                for row in np.lexsort(
                    (np.arange(len(cosines)), -np.float32(cosines - less))
                )
                if row not in LOST["refs"]
            ]
            for row in order[: vote.votes]:
                cosine = cosines[row]
                worth = {
                    "cosine_sum": cosine,
                    "cosine_mean": cosine / vote.votes,
                    "distance_sum": 2 * cosine - 1,
                }[vote.worth]
                said.append((share * (worth - less[row]), self.labels[row]))
            seen.append((order, cosines, models, share))
        sums = {}
        for worth, label in said:
            sums[label] = sums.get(label, 0) + worth
        best = max(sums.values())
        # the nearer wins; sums that only rounding tells apart are equal
        label = next(it for it, total in sums.items() if total > best - 1e-6)
        sure = sums[label]
        for order, cosines, models, share in seen:
            if penalty:
                near = self.near("query", penalty, penalty.query_near, models)[q]
                sure -= share * penalty.queries * near
            if background:
                far = order[vote.votes : max(background.near, vote.votes)]
                others = [row for row in far if self.labels[row] != label] or far[-1:]
                behind = np.mean(cosines[others]) if others else 0
                sure -= share * background.weight * behind
        return label, sure

    def predict(self, plan):
        whole = sum(plan.models.values())
        searches = [(plan.models, 1.0)]
        if plan.fusion == "votes":
            searches = [({m: 1.0}, w / whole) for m, w in plan.models.items()]
        read = [q for q in range(COUNTS["query"]) if q not in LOST["query"]]
        found = {q: self.sure(q, plan, searches) for q in read}
        curve, frequent = plan.step("probability"), plan.step("frequent")
        if curve:
            found = {
                q: (label, 1 / (1 + np.exp(-curve.slope * s - curve.offset)))
                for q, (label, s) in found.items()
            }
        if frequent:
            often = [label for label, _ in found.values()]
            banned = {q for q in found if often.count(found[q][0]) > frequent.most}
            like = self.cosines("query", "query", plan.models)
            found = {
                q: (label, -often.count(label) if q in banned else sure)
                for q, (label, sure) in found.items()
            }
            for q in set(found) - banned:
                near = max((like[q, other] for other in banned), default=-1)
                if 2 - 2 * near < frequent.within:
                    found[q] = found[q][0], 0.0
        return {q: (self.names[label], sure) for q, (label, sure) in found.items()}


ONE, TWO = {"one": 1.0}, {"one": 1.0, "two": 0.5}
STEPS = {
    "vote": (Vote(),),
    "nearest": (Vote(1),),
    "all vote": (Vote(100, "cosine_sum"),),
    "mean": (Vote(4, "cosine_mean"),),
    "non_landmark": (Vote(3, "cosine_sum"), NonLandmark()),
    "references": (Vote(), NonLandmark(0.7, 0.0, reference_near=3)),
    "queries": (Vote(), NonLandmark(0.0, 0.7, query_near=100)),
    "background": (Vote(), Background(0.5, 10)),
    "wide background": (Vote(2), Background(1.5, 1000)),
    "no background": (Vote(5), Background(1.5, 2)),
    "probability": (Vote(), Probability(2.0, -0.5)),
    "frequent": (Vote(), Frequent(3)),
    "spread": (Vote(), Frequent(4, 0.7)),
    "all": (
        Vote(5),
        NonLandmark(0.3, 0.4),
        Background(0.5, 12),
        Probability(1.5, 0.1),
        Frequent(4, 0.5),
    ),
}


@pytest.mark.parametrize("fusion", ["scores", "votes"])
@pytest.mark.parametrize("models", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_predictions_are_what_their_definition_says(work, steps, models, fusion):
    plan = Recogniser(models, steps, fusion)
    found = opened(work).predict(plan)
    wanted = Slow(work, models).predict(plan)
    assert list(found.columns) == ["id", "landmark", "confidence"]
    assert found["id"].tolist() == lists.load(work / "lists", "query").ids.tolist()
    for q, (landmark, sure) in enumerate(
        zip(found["landmark"], found["confidence"], strict=True)
    ):
        if q in LOST["query"]:
            assert (landmark, sure) == ("", 0.0)
            continue
        assert sure == pytest.approx(wanted[q][1], abs=1e-5), q
        assert landmark == wanted[q][0], q


def test_by_ranks_each_model_answers_alone(work):
    plan = Recogniser(TWO, (Vote(), Background(0.5, 10)), "ranks")
    found = opened(work).predict(plan)
    alone = {
        m: Slow(work, {m: 1.0}).predict(Recogniser({m: 1.0}, plan.steps)) for m in TWO
    }
    for q in alone["one"]:
        sums = {}
        for model, weight in TWO.items():
            made = [round(sure, 5) for _, sure in alone[model].values()]
            label, mine = alone[model][q][0], round(alone[model][q][1], 5)
            less = sum(c < mine for c in made) + 0.5 * sum(c == mine for c in made)
            sums[label] = sums.get(label, 0) + weight * less / len(made) / 1.5
        assert found["confidence"][q] == pytest.approx(max(sums.values()))
        assert sums[found["landmark"][q]] == pytest.approx(max(sums.values()))
    one = Recogniser(ONE, plan.steps, "ranks")  # of one model there is nothing to fuse
    pd.testing.assert_frame_equal(
        opened(work).predict(one), opened(work).predict(replace(one, fusion="scores"))
    )


# What must not matter


def test_weights_count_by_their_ratio(work):
    plan = Recogniser(TWO, STEPS["all"])
    larger = replace(plan, models={name: 4 * w for name, w in TWO.items()})
    one, other = (opened(work).predict(it) for it in (plan, larger))
    assert one["landmark"].tolist() == other["landmark"].tolist()
    np.testing.assert_allclose(one["confidence"], other["confidence"], atol=1e-6)


def test_distractors_are_the_same_in_blocks_of_any_size(work, monkeypatch):
    plan = Recogniser(ONE, STEPS["non_landmark"])
    before = opened(work).predict(plan)
    monkeypatch.setattr(distractors, "BLOCK", 4)
    pd.testing.assert_frame_equal(opened(work).predict(plan), before)


def test_a_second_question_has_the_same_answer(work):
    recognised = opened(work)
    plans = [Recogniser(ONE, steps) for steps in STEPS.values()]
    first = [recognised.predict(plan) for plan in plans]
    for plan, before in zip(reversed(plans), reversed(first), strict=True):
        pd.testing.assert_frame_equal(recognised.predict(plan), before)


def test_a_stored_list_serves_as_one_in_memory(work):
    query = lists.load(work / "lists", "query")
    places = work / "features", query, lists.find(work / "lists", "refs")
    plan = Recogniser(ONE)
    found = Recognition(*places).predict(plan)
    pd.testing.assert_frame_equal(found, opened(work).predict(plan))


# Landmarks and distractors


@pytest.mark.parametrize("block", [3, 1000])
def test_a_landmark_has_the_number_that_train_gives_it(work, block, monkeypatch):
    monkeypatch.setattr(lists, "BLOCK", block)
    refs = lists.load(work / "lists", "refs")
    assert recognition.landmarks(refs) == {n: str(n * 1000 + 7) for n in range(5)}
    assert "index" in set(refs.rows["landmark_id"])


def test_of_the_queries_only_public_ones_without_a_landmark_are_known(work):
    places = work / "lists", work / "features", "query"
    found = distractors.find(*places, SOLUTION)
    public = SOLUTION[(SOLUTION["usage"] == "Public") & (SOLUTION["landmarks"] == "")]
    assert set(found.ids) == set(public["id"]) and 0 < len(found.ids) < 8
    with pytest.raises(ValueError, match="only a solution tells"):
        distractors.find(*places)
    named = SOLUTION.assign(landmarks="7")
    with pytest.raises(ValueError, match="public half of list query has no image"):
        distractors.find(*places, named)


def test_a_query_is_not_its_own_distractor(work):
    scene = opened(work).scenes.of(ONE)
    found = distractors.find(work / "lists", work / "features", "query", SOLUTION)
    near = found.nearness(scene, "query", 1)
    cosines = Slow(work, ONE).cosines("query", "query", ONE)
    ids = scene.models[0].query.ids
    rows = [q for q in range(17) if ids[q] in found.ids and q not in LOST["query"]]
    for q in range(17):
        if q not in LOST["query"]:
            wanted = max(cosines[q, row] for row in rows if row != q)
            assert near[q].item() == pytest.approx(wanted, abs=1e-6)


def test_a_list_without_unlabelled_images_has_no_distractors(work):
    step = NonLandmark(images="refs")
    with pytest.raises(ValueError, match="list refs has no image without a landmark"):
        opened(work).predict(Recogniser(ONE, (Vote(), step)))


def test_distractors_of_another_version_of_the_list_are_refused(work):
    found = distractors.find(work / "lists", work / "features", "index")
    other = replace(found, hash="0" * 64)
    with pytest.raises(ValueError, match="is not the expected"):
        other.nearness(opened(work).scenes.of(ONE), "query", 3)


def test_what_is_missing_is_named(work):
    steps = Vote(), NonLandmark()
    with pytest.raises(ValueError, match="non_landmark needs the folder of the lists"):
        opened(work, lists_folder=None).predict(Recogniser(ONE, steps))
    with pytest.raises(ValueError, match="model one has no features of the reference"):
        write(work / "lists", "others", {"id": ["a" * 16], "label": [0]})
        opened(work, "others").predict(Recogniser(ONE))
    with pytest.raises(FileNotFoundError, match="no features in"):
        opened(work).predict(Recogniser({"three": 1.0}))
    with pytest.raises(ValueError, match="no solution to score landmarks by"):
        opened(work, solution=None).score(Recogniser(ONE))
    with pytest.raises(ValueError, match="verification needs the images"):
        opened(work).predict(Recogniser(ONE, (Vote(), Inliers())))


# The whole batch


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_query_is_answered_alike_alone_unless_the_batch_is_read(
    work, steps, tmp_path
):
    plan = Recogniser(ONE, steps)
    whole = opened(work).predict(plan)
    query = lists.load(work / "lists", "query")
    few = query.rows.iloc[4:6]
    write(tmp_path / "lists", "query", few.to_dict("list"))
    images = lists.load(tmp_path / "lists", "query")
    vectors = store.load(work / "features" / "one" / "query").vectors[4:6]
    for name in ("index", "refs"):
        (tmp_path / "features" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "features" / "one" / name).symlink_to(work / "features/one" / name)
    features(tmp_path / "features", images, "one", vectors)
    refs = lists.load(work / "lists", "refs")
    alone = Recognition(
        tmp_path / "features", images, refs, lists_folder=work / "lists"
    ).predict(plan)
    cut = whole.iloc[4:6].reset_index(drop=True)
    same = alone.equals(cut)
    assert same or plan.batch
    if steps == STEPS["frequent"]:
        assert not whole["confidence"].ge(0).all()


def test_calibrated_confidences_are_chances_in_the_same_order(work):
    recognised = opened(work)
    for steps in (STEPS["vote"], STEPS["frequent"]):
        plan = Recogniser(ONE, steps)
        found = recognised.predict(Recogniser(ONE))
        often = found["confidence"] > found["confidence"].median()
        right = np.where(often, found["landmark"], "1007")
        solution = SOLUTION.assign(landmarks=right)
        recognised = opened(work, solution=solution)
        sure = recognised.calibrated(plan)
        assert sure.step("probability") is not None
        assert recogniser.without(sure, "probability") == plan
        bare = recogniser.without(recogniser.without(sure, "frequent"), "probability")
        before = recognised.predict(bare)
        after = recognised.predict(recogniser.without(sure, "frequent"))
        read = before["landmark"] != ""
        assert after["confidence"][read].between(0, 1, inclusive="neither").all()
        order = [it["confidence"][read].rank() for it in (before, after)]
        assert order[0].tolist() == order[1].tolist()
        scores = [gap.evaluate(it, solution) for it in (before, after)]
        assert scores[0].private == scores[1].private


def test_the_private_half_teaches_no_curve(work):
    recognised, plan = opened(work), Recogniser(ONE)
    found = recognised.predict(plan)["confidence"]
    right = np.where(found > found.median(), "1007 7 2007 3007 4007", "")
    solution = SOLUTION.assign(landmarks=right)
    recognised = opened(work, solution=solution)
    private = solution["usage"] == "Private"
    other = solution.assign(landmarks=solution["landmarks"].mask(private, "none"))
    sure = recognised.calibrated(plan)
    assert sure.step("probability") is not None
    assert opened(work, solution=other).calibrated(plan) == sure


def test_a_half_that_is_all_right_teaches_no_curve(work):
    recognised, plan = opened(work), Recogniser(ONE)
    found = recognised.predict(plan)
    right = SOLUTION.assign(landmarks=found["landmark"].to_numpy())
    assert opened(work, solution=right).calibrated(plan) == plan


# Local verification


@pytest.fixture(scope="module")
def pictures(work, tmp_path_factory):
    """A textured photo for each image; a query shows a part of one reference's."""
    data = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(1)
    for name, count in COUNTS.items():
        rows = lists.load(work / "lists", name).rows
        (data / name).mkdir()
        for number, path in zip(range(count), rows["path"], strict=True):
            noise = np.random.default_rng(number % 11 if name != "index" else 99)
            image = cv2.resize(
                noise.integers(0, 256, (24, 24, 3)).astype(np.uint8), (96, 96)
            )
            grain = random.integers(0, 9, image.shape).astype(np.uint8)
            cv2.imwrite(str(data / path), cv2.add(image, grain))
    return data


@pytest.fixture(scope="module")
def counted(work, pictures):
    """(Q, R) inliers of every query with every reference."""
    way = verification.backend("sift")
    described = {
        name: [
            replace(way.describe, side=96)(cv2.imread(str(pictures / path))[..., ::-1])
            for path in lists.load(work / "lists", name).rows["path"]
        ]
        for name in ("query", "refs")
    }
    return np.array(
        [
            [verification.count(a, b, way) for b in described["refs"]]
            for a in described["query"]
        ]
    )


def test_inliers_add_to_what_a_vote_is_worth(work, pictures, counted):
    assert (counted >= 10).any() and (counted < 4).any()
    inliers = Inliers(weight=1.5, most=20, least_inliers=4, side=96)
    plan = Recogniser(TWO, (Vote(), inliers))
    found = opened(work, data=pictures).predict(plan)
    slow, sums = Slow(work, TWO), {}
    for q in set(range(COUNTS["query"])) - set(LOST["query"]):
        cosines = slow.cosines("query", "refs", TWO)[q]
        order = np.lexsort((np.arange(len(cosines)), -np.float32(cosines)))
        sums = {}
        for row in [row for row in order if row not in LOST["refs"]][:3]:
            count = counted[q, row] if counted[q, row] >= 4 else 0
            worth = 2 * cosines[row] - 1 + 1.5 * min(20, count) / 20
            sums[slow.labels[row]] = sums.get(slow.labels[row], 0) + worth
        best = max(sums.values())
        assert found["confidence"][q] == pytest.approx(best, abs=1e-5)
        chosen = [slow.names[label] for label, s in sums.items() if s > best - 1e-6]
        assert found["landmark"][q] == chosen[0]


def test_only_references_that_vote_are_described(work, pictures, tmp_path):
    recognised = opened(work, data=pictures)
    places = replace(recognised.scenes.pictures, folder=tmp_path)
    recognised.scenes.pictures = places
    plan = Recogniser(ONE, (Vote(1), Inliers(side=96)))
    recognised.predict(plan)
    rows = recognised.scenes.of(ONE).near("query", "reference", 1).rows
    voters = recognised.scenes.of(ONE).labelled.rows
    named = {int(voters[row]) for row in rows[:, 0]}
    there = store_of(tmp_path)
    assert sum(there.values()) == len(named) < COUNTS["refs"]
    recognised.predict(recogniser.with_step(plan, Inliers(0.5, side=96)))
    assert store_of(tmp_path) == there  # nothing new was asked for
    wider = recogniser.with_step(plan, Vote(2))
    recognised.predict(wider)
    more = store_of(tmp_path)
    assert len(more) == 2 and there.items() < more.items()
    rows = recognised.scenes.of(ONE).near("query", "reference", 2).rows
    assert sum(more.values()) == len({int(voters[row]) for row in rows.ravel()})
    again = opened(work, data=pictures)
    again.scenes.pictures = places
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again.predict(plan)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert before == after  # another run finds what was described


def test_a_reference_is_described_once_whoever_asks_for_it(
    work, pictures, counted, tmp_path
):
    refs = lists.load(work / "lists", "refs")
    shown = opened(work, data=pictures).scenes.pictures
    pairs = Pairs(replace(shown, folder=tmp_path), refs, refs.ids)
    nobody = torch.full((COUNTS["query"], 2), -1)
    assert not pairs.inliers(nobody, "sift", 96).any() and not store_of(tmp_path)
    first = nobody.clone()
    first[2] = torch.tensor([9, 4])
    found = pairs.inliers(first, "sift", 96)
    assert found[2].tolist() == counted[2, [9, 4]].tolist()
    assert found.sum() == found[2].sum()
    everybody = torch.tensor([[4, 30]]).repeat(COUNTS["query"], 1)
    again = pairs.inliers(everybody, "sift", 96)
    assert again.tolist() == counted[:, [4, 30]].tolist()
    assert sorted(store_of(tmp_path).values()) == [1, 2]  # 30; 4 and 9


def test_references_whose_images_are_not_there_are_not_verified(
    work, pictures, tmp_path
):
    (tmp_path / "query").symlink_to(pictures / "query")
    (tmp_path / "refs").mkdir()
    plan = Recogniser(ONE, (Vote(), Inliers(side=96)))
    recognised = opened(work, data=tmp_path)
    recognised.scenes.pictures = replace(
        recognised.scenes.pictures, folder=tmp_path / "local"
    )
    with pytest.raises(FileNotFoundError, match="verification needs their images"):
        recognised.predict(plan)


def store_of(folder):
    """Images described by each part."""
    found = (folder / "sift" / "96" / "refs-some").glob("*/manifest.json")
    return {path.parent.name: files.read_json(path)["images"] for path in found}
