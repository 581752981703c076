from dataclasses import replace

import numpy as np
import pytest
import torch

from kit.answers import retrieval
from kit.answers.retrieval import Part
from kit.data import lists, sources
from kit.features import store
from kit.features.store import Features
from kit.rerank.landmark_country import PUBLISHED, Tags, Weights

QUERIES, INDEX, REFERENCE = 13, 90, 70
BLOCKS = [(1, 1), (4, 7), (13, 90), (5, 1000), (256, 32_768)]


def unit(count, dim=16, seed=0):
    """(count, dim) float16 of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def features(vectors, name="index", model="m", unreadable=()):
    """A store in memory; its ids are numbers."""
    ids = np.char.mod(f"{name[0]}%04d", np.arange(len(vectors))).astype("U16")
    vectors = np.array(vectors, np.float16)
    vectors[list(unreadable)] = 0
    manifest = {
        "model": {"name": model, "hash": model * 64},
        "list": {"name": name, "hash": name * 8},
        "seen": {f"seen by {model}": "clean"},
        "unreadable": ids[list(unreadable)].tolist(),
    }
    return Features(ids, vectors, manifest)


def sorted_by_hand(scores, k):
    """Columns (Q, k): larger scores first, of equal ones the lower column."""
    columns = np.arange(scores.shape[1])
    return np.array([np.lexsort((columns, -row))[:k] for row in scores])


def cosines(a, b):
    return a.astype(np.float64) @ b.astype(np.float64).T


def votes_by_hand(scores, labels):
    """{label: share of the score} of one query's neighbours."""
    summed = {}
    for score, label in zip(scores, labels, strict=True):
        if label >= 0:
            summed[label] = summed.get(label, 0) + max(score, 0)
    total = sum(summed.values())
    return {label: s / total if total else 0 for label, s in summed.items()}


def dense(part):
    """(Q, N) scores of a part that knows its votes as `by_hand` does, in float64."""
    scores = cosines(part.query.vectors, part.index.vectors)
    if part.tags is None:
        return scores
    for votes, labels, weight in (
        (part.tags.query_landmark, part.tags.index_landmark, part.rerank.landmark),
        (part.tags.query_country, part.tags.index_country, part.rerank.country),
    ):
        for q, i in np.ndindex(scores.shape):
            for label, share in zip(votes.labels[q], votes.weights[q], strict=True):
                if labels[i] >= 0 and label == labels[i]:
                    scores[q, i] += weight * float(share)
    return scores


@pytest.fixture(params=BLOCKS, ids=str)
def blocks(request, monkeypatch):
    """Blocks of any number of queries and of index images."""
    monkeypatch.setattr(retrieval, "QUERIES", request.param[0])
    monkeypatch.setattr(retrieval, "INDEX", request.param[1])


@pytest.fixture
def query():
    return features(unit(QUERIES, seed=1), "query")


@pytest.fixture
def index():
    return features(unit(INDEX, seed=2), unreadable=(0, 33, 89))


@pytest.fixture
def voting():
    """References, their voting rows (one of them twice), landmarks and countries."""
    references = features(unit(REFERENCE, seed=3), "reference")
    random = np.random.default_rng(4)
    rows = np.append(random.permutation(REFERENCE)[:60], 5)
    landmarks = random.integers(0, 6, len(rows))
    countries = np.where(landmarks < 2, -1, landmarks // 2)
    return references, rows, landmarks, countries


@pytest.fixture
def tags(query, index, voting):
    return retrieval.tag(query, index, *voting)


# Tags


@pytest.mark.parametrize("votes", [1, 3, 10, 1000])
def test_tags_are_those_of_the_dense_scores(query, index, voting, votes, blocks):
    references, rows, landmarks, countries = voting
    tags = retrieval.tag(query, index, *voting, votes)
    scores = cosines(query.vectors, references.vectors[rows])
    nearest = sorted_by_hand(scores, votes)
    for found, labels in (
        (tags.query_landmark, landmarks),
        (tags.query_country, countries),
    ):
        for q in range(QUERIES):
            expected = votes_by_hand(scores[q, nearest[q]], labels[nearest[q]])
            shares = {
                int(label): float(weight)
                for label, weight in zip(found.labels[q], found.weights[q], strict=True)
                if label >= 0
            }
            assert shares == pytest.approx(expected, abs=1e-5)
    best = sorted_by_hand(cosines(index.vectors, references.vectors[rows]), 1)[:, 0]
    assert tags.index_landmark.tolist() == landmarks[best].tolist()
    assert tags.index_country.tolist() == countries[best].tolist()


def test_a_reference_can_vote_for_two_landmarks(query, index):
    references = features(query.vectors[:1], "reference")
    rows, landmarks = np.array([0, 0]), np.array([7, 9])
    tags = retrieval.tag(query, index, references, rows, landmarks, landmarks, 2)
    assert tags.query_landmark.labels[0].tolist() == [7, 9]
    torch.testing.assert_close(tags.query_landmark.weights[0], torch.tensor([0.5, 0.5]))
    assert tags.index_landmark.tolist() == [7] * INDEX  # the first of equal ones


# Ranking


@pytest.mark.parametrize("k", [1, 20, 100])
def test_the_ranking_is_that_of_the_dense_scores(query, index, tags, k, blocks):
    part = Part(query, index, tags=tags, rerank=Weights(0.3, 0.2))
    scores, rows = retrieval.rank([part], k)
    expected = dense(part)
    expected[:, ~index.readable()] = -np.inf
    at = sorted_by_hand(expected, k)
    assert rows.tolist() == at.tolist()
    best = torch.from_numpy(np.take_along_axis(expected, at, axis=1)).float()
    torch.testing.assert_close(scores, best)


def test_without_tags_or_with_weights_of_0_the_ranking_is_that_of_the_cosines(
    query, index, tags
):
    expected = cosines(query.vectors, index.vectors)
    expected[:, ~index.readable()] = -np.inf
    at = sorted_by_hand(expected, 50)
    for part in (Part(query, index), Part(query, index, tags=tags)):
        assert retrieval.rank([part], 50)[1].tolist() == at.tolist()


def test_several_models_add_up_by_their_weights(query, index, tags, blocks):
    parts = [
        Part(query, index, 1.0, tags, PUBLISHED),
        Part(
            features(unit(QUERIES, 8, seed=5), "query", "n"),
            features(unit(INDEX, 8, seed=6), model="n", unreadable=(0, 33, 89)),
            0.25,
        ),
        Part(query, features(unit(INDEX, seed=7)), 0.0),
    ]
    scores, rows = retrieval.rank(parts, 40)
    expected = dense(parts[0]) + 0.25 * dense(parts[1])
    expected[:, ~index.readable()] = -np.inf
    at = sorted_by_hand(expected, 40)
    assert rows.tolist() == at.tolist()
    best = torch.from_numpy(np.take_along_axis(expected, at, axis=1)).float()
    torch.testing.assert_close(scores, best)


def test_the_weight_of_a_lonely_model_changes_no_ranking(query, index, tags):
    part = Part(query, index, 1.0, tags, PUBLISHED)
    scores, rows = retrieval.rank([part], 60)
    again, at = retrieval.rank([replace(part, weight=4.0)], 60)
    assert torch.equal(at, rows)
    torch.testing.assert_close(again, 4 * scores)


def test_of_equal_scores_the_lower_row_comes_first(blocks):
    random = np.random.default_rng(0)
    few = features(random.integers(-1, 2, (QUERIES, 3)), "query")
    many = features(random.integers(-1, 2, (INDEX, 3)), unreadable=(0, 5))
    _, rows = retrieval.rank([Part(few, many)], 80)
    expected = cosines(few.vectors, many.vectors)
    expected[:, [0, 5]] = -np.inf
    assert rows.tolist() == sorted_by_hand(expected, 80).tolist()


def test_images_that_could_not_be_read_come_last_whatever_the_scores(blocks):
    query = features([[1.0, 0.0]], "query")
    index = features([[0, 0], [-1, 0], [0.5, 0], [-0.5, 0], [0, 0]], unreadable=(0, 4))
    scores, rows = retrieval.rank([Part(query, index)], 5)
    assert rows.tolist() == [[2, 3, 1, 0, 4]]
    assert scores.tolist() == [[0.5, -0.5, -1.0, -np.inf, -np.inf]]
    names, ranked = retrieval.answers([Part(query, index)], 5)
    assert names.tolist() == ["q0000"]
    assert ranked.tolist() == [["i0002", "i0003", "i0001", "", ""]]


def test_a_tag_does_not_bring_back_what_could_not_be_read(query, index, tags):
    same = torch.zeros(INDEX, dtype=torch.long)
    tags = Tags(tags.query_landmark, tags.query_country, same, same)
    part = Part(query, index, tags=tags, rerank=Weights(50.0, 50.0))
    _, rows = retrieval.rank([part], INDEX)
    assert rows[:, -3:].tolist() == [[0, 33, 89]] * QUERIES


def test_answers_are_the_ids_of_the_ranked_rows(query, index):
    parts = [Part(query, index)]
    _, rows = retrieval.rank(parts, 10)
    names, ranked = retrieval.answers(parts, 10)
    assert names.tolist() == query.ids.tolist()
    assert ranked.tolist() == index.ids[rows.numpy()].tolist()
    assert retrieval.answers(parts)[1].shape == (QUERIES, INDEX)


def test_features_are_not_modified(query, index, tags):
    before = query.vectors.copy(), index.vectors.copy()
    retrieval.rank([Part(query, index, 2.0, tags, PUBLISHED)], 10)
    assert np.array_equal(query.vectors, before[0])
    assert np.array_equal(index.vectors, before[1])


@pytest.mark.parametrize("which", ["query", "index"])
@pytest.mark.parametrize("how", ["fewer", "other order"])
def test_models_with_features_of_different_images_are_refused(query, index, which, how):
    given = {"query": query, "index": index}
    rows = slice(1, None) if how == "fewer" else slice(None, None, -1)
    old = given[which]
    manifest = old.manifest | {"model": {"name": "n", "hash": "n" * 64}}
    other = given | {which: Features(old.ids[rows], old.vectors[rows], manifest)}
    first, second = Part(query, index), Part(**other)
    with pytest.raises(ValueError, match="^models m and . have features of different"):
        retrieval.rank([first, second])


# From disk


@pytest.fixture
def made(tmp_path):
    """Nine train images of three landmarks in two countries, six of the index, three queries."""
    lines = ["path,label,group,split"]
    lines += [
        f"train/{n}.jpg,{'abc'[n % 3]},{['FR', 'FR', 'JP'][n % 3]},train"
        for n in range(9)
    ]
    lines += [f"index/{n}.jpg,{label},,index" for n, label in enumerate("abcxa")]
    lines += ["index/5.jpg,,,index"]
    lines += [f"query/{n}.jpg,{label},,query" for n, label in enumerate("abx")]
    for line in lines[1:]:
        path = tmp_path / "data" / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(tmp_path / "table.csv", tmp_path / "data")
    lists.build(facts, tmp_path / "data", tmp_path / "lists", sizes=False)
    return {
        name: lists.load(tmp_path / "lists", name)
        for name in ("query", "index", "full")
    }


VECTORS = {"query": unit(3, 4, 1), "index": unit(6, 4, 2), "full": unit(9, 4, 3)}


def write(folder, images, model="m", vectors=None):
    about = {
        "model": {"name": "clean", "hash": model * 64},
        "list": {"name": images.name, "hash": images.hash},
        "seen": {"c" * 64: "clean"},
    }
    values = VECTORS[images.name] if vectors is None else vectors
    store.create(folder / images.name, images.ids, 4, 4, about)
    maps, done = store.open_for_writing(folder / images.name)
    maps[:], done[:] = values, 1
    store.finish(folder / images.name)
    return folder / images.name


@pytest.fixture
def folder(tmp_path, made):
    for images in made.values():
        write(tmp_path / "features" / "clean", images)
    return tmp_path / "features" / "clean"


def test_a_part_is_one_model_s_features_of_both_lists(folder, made):
    part = retrieval.part(folder, made["query"], made["index"])
    assert part.query.ids.tolist() == made["query"].ids.tolist()
    assert part.index.ids.tolist() == made["index"].ids.tolist()
    assert part.tags is None and part.weight == 1
    expected = sorted_by_hand(cosines(VECTORS["query"], VECTORS["index"]), 6)
    assert retrieval.rank([part])[1].tolist() == expected.tolist()


def shares(votes):
    return [
        {
            label: pytest.approx(weight, abs=1e-5)
            for label, weight in zip(*row, strict=True)
            if label >= 0
        }
        for row in zip(votes.labels.tolist(), votes.weights.tolist(), strict=True)
    ]


def test_a_part_is_tagged_by_the_nearest_references(folder, made):
    part = retrieval.part(folder, made["query"], made["index"], made["full"], votes=2)
    labels, places = made["full"].labels, made["full"].countries
    assert labels.tolist() == [0, 1, 2] * 3
    assert places.tolist() == [places[0], places[0], places[2]] * 3
    scores = cosines(VECTORS["query"], VECTORS["full"])
    nearest = sorted_by_hand(scores, 2)
    for q in range(3):
        near = nearest[q]
        landmarks = votes_by_hand(scores[q, near], labels[near])
        assert landmarks == shares(part.tags.query_landmark)[q]
        countries = votes_by_hand(scores[q, near], places[near])
        assert countries == shares(part.tags.query_country)[q]
    best = sorted_by_hand(cosines(VECTORS["index"], VECTORS["full"]), 1)[:, 0]
    assert part.tags.index_landmark.tolist() == labels[best].tolist()
    assert part.tags.index_country.tolist() == places[best].tolist()


def test_images_without_label_and_unreadable_ones_do_not_vote(folder, made):
    vectors = VECTORS["index"].copy()
    vectors[1] = 0
    write(folder, made["index"], "n", vectors)
    write(folder, made["query"], "n")
    assert made["index"].labels.tolist() == [0, 1, 2, -1, 0, -1]
    part = retrieval.part(folder, made["query"], made["index"], made["index"], votes=6)
    voted = part.tags.query_landmark.labels
    assert voted.shape == (3, 3)  # images 0, 2 and 4
    assert set(voted.flatten().tolist()) == {0, 2, -1}
    assert set(part.tags.index_landmark.tolist()) == {0, 2}


def test_references_of_which_none_could_vote_are_refused(folder, made):
    write(folder, made["full"], "m", np.zeros((9, 4)))
    with pytest.raises(ValueError, match="^list full has no labelled image that could"):
        retrieval.part(folder, made["query"], made["index"], made["full"])


def test_missing_features_are_refused(folder, made, tmp_path):
    with pytest.raises(FileNotFoundError, match="no features in .*03_extract_features"):
        retrieval.part(tmp_path / "nowhere", made["query"], made["index"])


@pytest.mark.parametrize("name", ["query", "index", "full"])
def test_features_of_another_version_of_a_list_are_refused(folder, made, name):
    newer = made | {name: replace(made[name], hash="0" * 64)}
    message = f"^features of list {name}: hash .* is not the expected 000000000000"
    with pytest.raises(ValueError, match=message):
        retrieval.part(folder, newer["query"], newer["index"], newer["full"])


@pytest.mark.parametrize("name", ["index", "full"])
def test_features_of_another_model_are_refused(folder, made, name):
    write(folder, made[name], "n")
    message = "^features of model clean: hash nnnnnnnnnnnn is not the expected mmmmmmmm"
    with pytest.raises(ValueError, match=message):
        retrieval.part(folder, made["query"], made["index"], made["full"])


def test_what_was_seen_are_the_lists_of_the_models_and_the_references(
    query, index, made
):
    other = features(unit(QUERIES), "query", "n")
    met = retrieval.seen([Part(query, index), Part(other, index)], made["full"])
    assert met == {
        "seen by m": "clean",
        "seen by n": "clean",
        made["full"].hash: "full",
    }
