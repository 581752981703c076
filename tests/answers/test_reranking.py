from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kit.answers import bonuses, moves, rankings, tags
from kit.answers.pictures import Pictures
from kit.answers.reranking import rank
from kit.answers.scene import INDEX, QUERY, Scene, Voters
from kit.rerank import landmark_country, steps
from kit.rerank.chain import Chain
from kit.rerank.local import verification
from tests.answers.scenes import (
    LOST,
    best,
    bonus,
    by_score,
    cosines,
    features,
    model,
    scene,
    unit,
    votes,
)

SEARCH = {name: kind() for name, kind in steps.STEPS.items() if kind.name != "local"}
for name in ("verified_qe", "verified_dba"):  # all three need pictures
    SEARCH.pop(name)
TUNED = steps.LandmarkCountry(0.3, 0.2)


def chain(*chosen, models=("m",), **options):
    return Chain(dict.fromkeys(models, 1.0), tuple(chosen), **options)


def dense(one, voting, landmark=0.3, country=0.2, k=3):
    """(Q, N) scores of one model with the bonus of its own tags."""
    references = one.reference.vectors[voting.rows]
    index, query = (cosines(x.vectors, references) for x in (one.index, one.query))
    gained = bonus(voting, index, query, landmark, country, k)
    return cosines(one.query.vectors, one.index.vectors) + gained


def same(found, expected):
    scores, rows = expected
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 20, 100])
def test_without_steps_the_ranking_is_that_of_the_cosines(k):
    one = model()
    expected = best(cosines(one.query.vectors, one.index.vectors), k)
    same(rank(scene(one), chain(k=k)), expected)


@pytest.mark.parametrize("k", [1, 20, 100])
def test_landmarks_and_countries_add_what_the_votes_say(k):
    at = scene()
    expected = best(dense(at.models[0], at.labelled), k)
    same(rank(at, chain(TUNED, k=k)), expected)


def test_each_model_s_own_tags_count_by_its_weight():
    pair = model(), model("n", seed=10, dim=8)
    at = scene(*pair, weights=(1.0, 0.25))
    scores = sum(
        weight * dense(each, at.labelled)
        for each, weight in zip(pair, (1.0, 0.25), strict=True)
    )
    same(rank(at, chain(TUNED, models="mn", k=40)), best(scores, 40))


def test_tags_of_the_sum_are_those_of_the_summed_scores():
    pair, shares = (model(), model("n", seed=10, dim=8)), (1.0, 0.25)
    at = scene(*pair, weights=shares)

    def summed(which, rows=None):
        return sum(
            share
            * cosines(
                getattr(each, which).vectors,
                each.index.vectors if rows is None else each.reference.vectors[rows],
            )
            for each, share in zip(pair, shares, strict=True)
        )

    rows = at.labelled.rows
    gained = bonus(at.labelled, summed("index", rows), summed("query", rows), 0.3, 0.2)
    expected = best(summed("query") + 1.25 * gained, 40)
    same(rank(at, chain(TUNED, models="mn", k=40, fusion="tags")), expected)


def test_ranks_of_several_models_are_fused_by_their_places():
    pair = model(), model("n", seed=10, dim=8)
    at = scene(*pair, weights=(1.0, 0.5))
    scores = np.zeros((13, 90))
    for each, weight in zip(pair, (1.0, 0.5), strict=True):
        rows = best(dense(each, at.labelled), 87)[1]
        for q, place in np.ndindex(rows.shape):
            scores[q, rows[q, place]] += weight / (61 + place)
    found = rank(at, chain(TUNED, models="mn", k=87, fusion="ranks"))
    assert found.rows.tolist() == best(scores, 87)[1].tolist()


def test_the_weight_of_a_lonely_model_changes_no_ranking():
    once, four = rank(scene(), chain(TUNED)), rank(scene(weights=(4.0,)), chain(TUNED))
    assert torch.equal(four.rows, once.rows)
    torch.testing.assert_close(four.scores, 4 * once.scores)


@pytest.mark.parametrize("step", SEARCH.values(), ids=SEARCH)
@pytest.mark.parametrize("count", [1, 2])
def test_every_step_ranks_readable_images_once_and_leaves_its_input_alone(step, count):
    models = (model(), model("n", seed=10))[:count]
    at = scene(*models, weights=(1.0, 0.5)[:count])
    stores = [each.of(which) for each in models for which in at.there()]
    before = [each.vectors.copy() for each in stores]
    scores, rows = rank(at, chain(step, models="mn"[:count], k=30))
    assert scores.shape == rows.shape == (13, 30)
    for row, values in zip(rows.tolist(), scores.tolist(), strict=True):
        there = [each for each in row if each >= 0]
        assert row == there + [-1] * (30 - len(there))
        assert len(set(there)) == len(there) and not set(there) & set(LOST)
        assert values == sorted(values, reverse=True)
    for each, copy in zip(stores, before, strict=True):
        assert np.array_equal(each.vectors, copy)


@pytest.mark.parametrize("step", SEARCH.values(), ids=SEARCH)
def test_a_ranking_does_not_depend_on_the_order_of_the_index(step):
    one = model()
    turn = np.random.default_rng(9).permutation(90)
    lost = [int(np.flatnonzero(turn == each)[0]) for each in LOST]
    turned = type(one)(
        one.query,
        features(one.index.vectors[turn], unreadable=lost),
        one.reference,
    )
    (scores, rows), (again, at) = (
        rank(scene(each), chain(step, k=20)) for each in (one, turned)
    )
    torch.testing.assert_close(again, scores, atol=2e-3, rtol=0)
    moved = torch.from_numpy(turn)[at] != rows
    if step.kind != steps.FEATURES:  # those are rounded to float16 again
        assert not moved.any()
    assert moved.float().mean() < 0.05


def test_queries_are_expanded_by_the_index_and_by_other_queries_only_if_asked():
    at = scene()
    one = at.models[0]
    everything = np.concatenate([one.query.vectors, one.index.vectors])
    for transductive in (False, True):
        union = everything if transductive else one.index.vectors
        products = cosines(one.query.vectors, union)
        lost = [each + 13 * transductive for each in LOST]
        products[:, lost] = -np.inf
        if transductive:
            products[np.arange(13), np.arange(13)] = -np.inf
        moved = one.query.vectors.astype(np.float64)
        for q, near in enumerate(by_score(products, 4)):
            moved[q] += (products[q, near, None].clip(0) ** 2 * union[near]).sum(0)
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        step = steps.AlphaQe(4, 2.0, transductive)
        found = moves.move(step, at).models[0].query.vectors
        np.testing.assert_allclose(found, moved, atol=1e-3)


def test_steps_of_one_kind_follow_each_other():
    dba, expansion = steps.Dba(3), steps.AlphaQe(3)
    at = scene()
    moved = moves.move(expansion, moves.move(dba, at))
    expected = best(
        cosines(moved.models[0].query.vectors, moved.models[0].index.vectors), 20
    )
    same(rank(at, chain(dba, expansion, k=20)), expected)


def test_an_unconfident_vote_leaves_its_list_alone():
    at = scene()
    plain = rank(at, chain())
    shares = [
        max(votes(s, labels).values())
        for s, labels in zip(*(x.numpy() for x in at.votes(QUERY, 3)[:2]), strict=True)
    ]
    least = float(sorted(shares)[6]) - 1e-6
    gated = rank(at, chain(steps.LandmarkCountry(0.3, 0.0, confidence=least)))
    ungated = rank(at, chain(steps.LandmarkCountry(0.3, 0.0)))
    for q, share in enumerate(shares):
        wanted = ungated if share >= least else plain
        assert gated.rows[q].tolist() == wanted.rows[q].tolist()


@pytest.mark.parametrize("way", ["cosine", "k_reciprocal", "class_mean"])
def test_every_way_to_tag_finds_a_landmark_that_is_plain(way):
    """Queries and index images stand on their landmark's references."""
    centres = unit(6, 32, seed=1)
    noise = unit(200, 32, seed=2).astype(np.float32) * 0.1

    def near(labels, first):
        vectors = (
            centres[labels].astype(np.float32) + noise[first : first + len(labels)]
        )
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    labels = {"query": np.arange(13) % 6, "index": np.arange(90) % 6}
    voting = scene().labelled
    owner = np.zeros(70, int)
    owner[voting.rows[:60]] = voting.landmarks[:60].numpy()
    at = scene(
        type(model())(
            features(near(labels["query"], 0), "query"),
            features(near(labels["index"], 20)),
            features(near(owner, 110), "reference"),
        )
    )
    step = steps.LandmarkCountry(5.0, 0.0, query_tags=way)
    _, rows = rank(at, chain(step, k=15))
    assert (labels["index"][rows.numpy()] == labels["query"][:, None]).mean() > 0.95


class Textures(Pictures):
    """One texture a landmark, each image a little turned; described by the backend."""

    def __call__(self, which, backend, side):
        random = np.random.default_rng(3)
        textures = [
            cv2.resize(random.integers(0, 256, (40, 40), np.uint8), (160, 160))
            for _ in range(4)
        ]
        found = []
        for number in range(13 if which == QUERY else 90):
            turn = cv2.getRotationMatrix2D((80, 80), number % 7, 1.0)
            turned = cv2.warpAffine(textures[number % 4], turn, (160, 160))
            found.append(verification.backend(backend).describe(turned))
        return found


def test_local_features_bring_the_same_texture_to_the_front():
    at = scene(model(unreadable=()), pictures=Textures(Path(), Path(), {}))
    plain = rank(at, chain(k=12)).rows.numpy()
    step = steps.Local(top=12, weight=3.0, most=30)
    rows = rank(at, chain(step, k=12)).rows.numpy()
    for q in range(13):
        assert sorted(rows[q]) == sorted(plain[q])
        agrees = (rows[q] % 4 == q % 4).tolist()
        assert agrees == sorted(agrees, reverse=True)
    moved = (rows != plain).any(axis=1)
    assert moved.sum() > 8
    expanded = moves.move(steps.VerifiedQe(12, 3, least_inliers=15), at)
    assert not np.array_equal(
        expanded.models[0].query.vectors, at.models[0].query.vectors
    )
    of_index = moves.move(steps.VerifiedDba(6, 3, least_inliers=15), at).models[0]
    assert np.array_equal(of_index.query.vectors, at.models[0].query.vectors)
    rows = at.near(INDEX, INDEX, 6).rows
    stored = at.stored(INDEX).double()
    for image in (0, 41):
        same = [r for r in rows[image].tolist() if r != image and r % 4 == image % 4][
            :3
        ]
        wanted = stored[image] + sum(
            (stored[r] @ stored[image]) * stored[r] for r in same
        )
        found = torch.from_numpy(of_index.index.vectors[image]).double()
        assert same and torch.dist(found, wanted / wanted.norm()) < 2e-3


def test_local_verification_without_images_says_so():
    with pytest.raises(ValueError, match="local verification needs the images"):
        rank(scene(), chain(steps.Local()))


def test_a_step_is_not_used_as_another_kind():
    for use in (moves.move, bonuses.gain):
        with pytest.raises(TypeError, match="^step refine "):
            use(steps.Refine(), scene())
    with pytest.raises(TypeError, match="^step dba orders no ranking"):
        rankings.order(steps.Dba(), scene(), torch.zeros(1, 1), torch.zeros(1, 1))


def test_unreadable_images_have_no_predicted_landmark():
    found = tags.predicted(scene(), INDEX, 3)
    assert found.labels[list(LOST)].tolist() == [-1] * 3
    assert (found.labels >= 0).sum() == 87


def test_moves_that_a_chain_shares_with_the_one_before_are_made_once(monkeypatch):
    made, work = [], moves.move
    monkeypatch.setattr(
        "kit.answers.reranking.move",
        lambda step, at: made.append(str(step)) or work(step, at),
    )
    at, fresh = scene(), scene()
    first, second = steps.Dba(4), steps.AlphaQe(3)
    other = steps.AlphaQe(5)
    rank(at, chain(first, second))
    rank(at, chain(first, second, steps.Refine()))
    assert made == [str(first), str(second)]
    found = rank(at, chain(first, other))
    assert made[2:] == [str(other)]
    plain = rank(at, chain())
    expected = [rank(fresh, chain(first, other)), rank(scene(), chain())]
    for one, wanted in zip((found, plain), expected, strict=True):
        assert torch.equal(one.rows, wanted.rows)
        assert torch.equal(one.scores, wanted.scores)
    again = rank(at, chain(other, first))  # another order is another path
    assert torch.equal(again.rows, rank(scene(), chain(other, first)).rows)


VOTERS = {  # rows of the references that vote, their landmarks and countries
    "nobody votes": ([], [], []),
    "one reference, of a landmark that the index lacks": ([7], [3], [-1]),
    "references of one landmark, without a country": (
        [*range(60)],
        [0] * 60,
        [-1] * 60,
    ),
    "a landmark a reference": ([*range(60)], [*range(60)], [-1] * 60),
}


def voting(kind):
    rows, landmarks, countries = VOTERS[kind]
    texts = torch.tensor(landmarks, dtype=torch.long), torch.tensor(countries).long()
    return Voters(np.array(rows, np.int64), *texts)


def open_scene(kind, *models, weights=(1.0,), **more):
    return Scene(models or (model(),), weights, voting(kind), **more)


def variants(kind):
    """A step as published, and with each of its other choices and switches."""
    yield kind()
    for name, choices in kind.choices.items():
        yield from (kind(**{name: choice}) for choice in choices)
    for each in fields(kind):
        if each.type is bool:
            yield kind(**{each.name: not each.default})


EVERY = [one for kind in SEARCH.values() for one in variants(type(kind))]
READS = (  # steps that read labels and nothing else of a reference
    *(steps.LandmarkCountry, steps.SoftLabels, steps.SameLabel),
    *(steps.SortInsert, steps.Category, steps.CategoryExpansion),
)


@pytest.mark.parametrize("step", [s for s in EVERY if isinstance(s, READS)], ids=str)
def test_where_nobody_votes_a_step_that_reads_labels_must_leave_the_search(step):
    at = open_scene("nobody votes")
    assert rank(at, chain(step)).rows.tolist() == rank(at, chain()).rows.tolist()


@pytest.mark.parametrize("fusion", ["scores", "tags", "ranks"])
@pytest.mark.parametrize("kind", VOTERS)
@pytest.mark.parametrize("step", EVERY, ids=str)
def test_every_step_must_answer_or_refuse_an_open_set(step, kind, fusion):
    pair, shares = (model(), model("n", seed=10, dim=8)), (1.0, 0.25)
    at = open_scene(kind, *pair, weights=shares)
    asked = chain(step, models="mn", fusion=fusion, k=20)
    learns = isinstance(step, steps.Whitening) and step.supervised
    if learns and len(set(at.labelled.landmarks.tolist())) in (0, 1, 60):
        with pytest.raises(ValueError, match="a whitening needs two classes"):
            rank(at, asked)
        return
    scores, rows = rank(at, asked)
    assert rows.shape == (len(at), 20) and not scores.isnan().any()
    for row in rows.tolist():  # each image once, and none that could not be read
        there = [each for each in row if each >= 0]
        assert len(set(there)) == len(there) and not set(there) & set(LOST)


@pytest.mark.parametrize("kind", list(VOTERS)[1:])
def test_a_bonus_by_landmarks_that_no_index_image_has_must_change_nothing(kind):
    at = open_scene(kind)
    labels = torch.full((90,), -1)
    tags_of = landmark_country.Tags
    votes_of = landmark_country.vote(*at.votes(QUERY, 3)[:2])
    none = tags_of(votes_of, votes_of, labels, labels)
    more = landmark_country.addends(none, landmark_country.PUBLISHED)
    found = at.near(QUERY, INDEX, 20, more)
    assert found.rows.tolist() == at.near(QUERY, INDEX, 20).rows.tolist()
