from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from kit.answers import leave_one_out, reranking
from kit.answers.scene import INDEX, QUERY, Model, Scene, Voters
from kit.rerank import steps
from kit.rerank.chain import Chain
from tests.answers.scenes import features, unit

COUNT, OUTSIDE, DIM = 14, 3, 8
LOST = (4, 11)  # index images that cannot be read; 4 asks, too

SHORT = {"shortlist": 6}
STEPS = {
    **{name: kind() for name, kind in steps.STEPS.items()},
    "whitening": steps.Whitening(5, supervised=False),
    "whitening by labels": steps.Whitening(5, ridge=0.1),
    "dba": steps.Dba(3),
    "dba of labels": steps.Dba(5, supervised=True),
    "dba wider than the index": steps.Dba(60, "powered"),
    "alpha_qe": steps.AlphaQe(3),
    "alpha_qe with queries": steps.AlphaQe(4, transductive=True),
    "smoothing with queries": steps.Smoothing(4, transductive=True),
    "verified_qe": steps.VerifiedQe(6, 2, 40),
    "verified_dba": steps.VerifiedDba(7, 2, 40),
    "k_reciprocal": steps.KReciprocal(5, 3, shortlist=9),
    "diffusion": steps.Diffusion(6, 3, **SHORT),
    "traversal": steps.Traversal(5, 0.1),
    "refine": steps.Refine(3, **SHORT),
    "local": steps.Local(top=6),
}
CHAINS = {
    **{name: (step,) for name, step in STEPS.items()},
    "none": (),
    "small-places": (steps.Dba(3), steps.Local(top=6)),
    "verified twice": (
        steps.VerifiedDba(6, 2, 30),
        steps.VerifiedQe(6, 2, 30),
        steps.Local(top=3),
        steps.Local(top=5),
    ),
    "moved, then a graph": (
        steps.Whitening(6, supervised=False),
        steps.Smoothing(3),
        steps.KReciprocal(4, 2),
        steps.Local(top=4),
        steps.Diffusion(5, 2),
    ),
}


@dataclass(frozen=True)
class Verified:
    """Inliers of queries with index images, and of index images with each other."""

    tables: dict

    def inliers(self, of, rows, backend, side):
        table = torch.from_numpy(self.tables[of])
        return table.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, 0)


def tables(seed):
    random = np.random.default_rng(seed)
    index = random.integers(0, 99, (COUNT, COUNT), dtype=np.int32)
    index = np.triu(index, 1) + np.triu(index, 1).T
    queries = random.integers(0, 99, (COUNT, COUNT), dtype=np.int32)
    return Verified({QUERY: queries, INDEX: index})


def example(seed, models=1):
    """A scene, and the index row of each query's own image; some ask by a crop of it."""
    random = np.random.default_rng(seed)
    own = random.permutation(COUNT)
    own[random.choice(np.flatnonzero(own != LOST[0]), OUTSIDE, replace=False)] = -1
    found = []
    for number in range(models):
        index = unit(COUNT, DIM, 10 * seed + number + 1)
        index[list(LOST)] = 0
        query = np.where((own >= 0)[:, None], index[own], unit(COUNT, DIM, seed))
        query[1::4] = unit(len(query[1::4]), DIM, 10 * seed + number + 5)
        query[own == LOST[0]] = 0
        found.append(
            Model(
                features(query, "query", "mn"[number]),
                features(index, "index", "mn"[number], LOST),
                features(unit(30, DIM, seed + 7), "reference", "mn"[number]),
            )
        )
    landmarks = torch.from_numpy(random.integers(0, 4, 30))
    voters = Voters(np.arange(30), landmarks, landmarks // 2)
    weights = (1.0, 0.5)[:models]
    return Scene(tuple(found), weights, voters, tables(seed)), own


def rebuilt(scene, own, query):
    """The scene of one query and of those that are in no index; its own image is nowhere."""
    asking = [query, *(q for q in range(len(own)) if own[q] < 0 and q != query)]
    kept = [row for row in range(COUNT) if row != own[query]]
    lost = [kept.index(row) for row in LOST if row in kept]
    models = tuple(
        Model(
            features(each.query.vectors[asking], "query", each.name),
            features(each.index.vectors[kept], "index", each.name, lost),
            each.reference,
        )
        for each in scene.models
    )
    counts = scene.pictures.tables
    pictures = Verified(
        {
            QUERY: counts[QUERY][np.ix_(asking, kept)],
            INDEX: counts[INDEX][np.ix_(kept, kept)],
        }
    )
    return Scene(models, scene.weights, scene.voters, pictures), kept


def slow(scene, chain, own):
    """Rebuilds everything for each query, and keeps the ranking of this one."""
    ids, values = [], []
    for query in range(len(own)):
        left, kept = rebuilt(scene, own, query)
        scores, rows = reranking.rank(left, chain)
        ids.append([kept[row] if row >= 0 else -1 for row in rows[0].tolist()])
        values.append(scores[0])
    return torch.stack(values), ids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_ranks_as_if_the_index_were_rebuilt_for_each_query(name, seed):
    scene, own = example(seed)
    chain = Chain({"m": 1.0}, CHAINS[name], k=12)
    scores, rows = leave_one_out.rank(scene, chain, own)
    expected, ids = slow(scene, chain, own)
    assert rows.tolist() == ids
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["scores", "ranks", "tags"])
@pytest.mark.parametrize("name", ["none", "dba", "alpha_qe", "k_reciprocal", "local"])
def test_several_models_are_fused_without_the_own_image(name, fusion):
    scene, own = example(5, models=2)
    models = {"m": 1.0, "n": 0.5}
    chain = Chain(models, CHAINS[name], fusion, k=COUNT)
    scores, rows = leave_one_out.rank(scene, chain, own)
    kept = replace(chain, k=COUNT - 1)  # a rebuilt index has one image less
    expected, ids = slow(scene, kept, np.where(own < 0, -1, own))
    for query, row in enumerate(ids):
        assert rows[query, : len(row)].tolist() == row
        torch.testing.assert_close(scores[query, : len(row)], expected[query])


def test_an_index_of_nothing_but_the_query_s_own_image_finds_nothing():
    index = unit(1, DIM)
    model = Model(features(index, "query"), features(index))
    found = leave_one_out.rank(
        Scene((model,), (1.0,)), Chain({"m": 1.0}, (steps.Dba(3),)), np.array([0])
    )
    assert (found.rows == -1).all() and torch.isneginf(found.scores).all()


def test_queries_outside_of_the_index_are_ranked_as_ever():
    scene, _ = example(1)
    chain = Chain({"m": 1.0}, (steps.KReciprocal(5, 3), steps.Local()), k=9)
    found = leave_one_out.rank(scene, chain, np.full(COUNT, -1))
    for ours, theirs in zip(found, reranking.rank(scene, chain), strict=True):
        assert torch.equal(ours, theirs)
