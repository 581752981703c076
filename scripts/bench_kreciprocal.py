"""Rows of `bench.py kreciprocal`: k-reciprocal re-ranking and query tags against published loops.

The vectors are synthetic: class centres, the classes as uneven as real ones, and noise. The
baselines are written from the definitions, as the 2nd place of Google Landmark Retrieval 2021 had
them: dense arrays, a full argsort, loops over rows and members.
"""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.features import search
from kit.rerank.k_reciprocal import encode, jaccard, jaccard_rerank
from kit.rerank.k_reciprocal_tags import tag_scores
from kit.rerank.landmark_country import vote

DIM, QUERIES = 512, 1129
K1, K2, SHARE = 20, 6, 0.3
UNION, SMALL_UNION = 10_000, 2_000  # queries and index; with --quick
LARGE, FEW_LARGE, SHORTLIST = 100_000, 10_000, 1000
REFERENCES, FEW_REFERENCES, NEAR, VOTES = 300_000, 30_000, 30, 3
SAMPLE = 8  # queries that the loop over queries is timed on
BYTES, SECONDS, DIFFERENCE = 6e9, 300, 1e-6  # allowed


def dense_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """All queries against all of the index; the graph is built within the time."""
    count = SMALL_UNION if bench.quick else UNION
    queries = count // 10
    features, _ = clustered(count, count // 20)
    vectors = features.float()

    def ours() -> Tensor:
        graph = search.knn(features, features, K1 + 1).rows
        encoding = encode(graph, features, queries, K1, K2)
        distances = (1 - vectors[:queries] @ vectors[queries:].T) / 2
        distances *= SHARE
        far = jaccard(encoding, torch.arange(queries))[:, queries:]
        return distances.add_(far, alpha=1 - SHARE)

    def theirs() -> np.ndarray:
        return dense_loop(vectors, queries)

    ours_s, theirs_s = bench.interleaved(ours, theirs)
    name = f"k-reciprocal, union of {count}, {queries} queries"
    yield bench.speed(name, ours_s, theirs_s, 15, False)
    # ranked by exact cosines: what float32 rounds to a tie has no order to compare
    expected = dense_loop(features.double(), queries)
    difference = np.abs(ours().numpy() - expected).max()
    yield bench.row(
        f"{name}: {DIFFERENCE:g} / difference", DIFFERENCE / difference, 1, False
    )


def large_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """A process of its own, whose memory is counted whole: graph, encodings, shortlists."""
    count = FEW_LARGE if bench.quick else LARGE
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, size = pool.apply(large, (count,))
    name = f"k-reciprocal, union of {count}, {QUERIES} queries"
    yield bench.row(f"{name}: {SECONDS} s / time", SECONDS / seconds, 1, False, seconds)
    yield bench.row(f"{name}: {BYTES / 1e9:g} GB / memory", BYTES / size, 1, False)


def large(count: int) -> tuple[float, int]:
    """Seconds, and the most bytes that the process has held."""
    features, _ = clustered(count, count // 20)
    start = time.perf_counter()
    graph = search.knn(features, features, K1 + 1).rows
    encoding = encode(graph, features, QUERIES, K1, K2)
    found = search.knn(features[:QUERIES], features[QUERIES:], SHORTLIST)
    jaccard_rerank(*found, encoding, SHARE)
    seconds = time.perf_counter() - start
    # ru_maxrss would count what the process before had held
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return seconds, int(most) * 1024


def tag_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """Nearest references, their k-reciprocal scores and the vote; the graph is there before.

    Only the graph's rows that these queries read are made.
    """
    count = FEW_REFERENCES if bench.quick else REFERENCES
    features, labels = clustered(count + QUERIES, count // 20)
    queries, references = features[:QUERIES], features[QUERIES:]
    labels = labels[QUERIES:]
    read = search.knn(queries, references, NEAR).rows.unique()
    graph = torch.full((count, NEAR), -1)
    graph[read] = search.knn(references[read], references, NEAR).rows
    vectors = references.float()

    def ours() -> Tensor:
        near = search.knn(queries, references, NEAR).rows
        scores, rows = tag_scores(queries, near, graph, references, VOTES)
        vote(scores, labels[rows])
        return rows

    def theirs() -> list[Tensor]:
        return [tag_loop(query, vectors, labels) for query in queries[:SAMPLE].float()]

    ours_s, theirs_s = bench.interleaved(ours, theirs)
    name = f"query tags, {QUERIES} queries, {count} references"
    scaled = theirs_s / SAMPLE * QUERIES
    yield bench.speed(f"{name}, loop on {SAMPLE}", ours_s, scaled, 40, False)
    pairs = zip(ours()[:SAMPLE].tolist(), theirs(), strict=True)
    same = sum(set(rows) == set(found.tolist()) for rows, found in pairs)
    yield bench.row(f"{name}: share of equal top-{VOTES}", same / SAMPLE, 1, False)


def clustered(count: int, classes: int) -> tuple[Tensor, Tensor]:
    """(count, DIM) float16 features of unit length, half of it noise, and labels (count,)."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, classes + 1, dtype=torch.float32) ** -0.6
    labels = torch.multinomial(sizes, count, replacement=True, generator=draw)
    centres = torch.randn(classes, DIM, generator=draw)
    parts = []
    for some in labels.split(16_384):
        noise = torch.randn(len(some), DIM, generator=draw)
        parts.append(torch.nn.functional.normalize(centres[some] + noise, dim=1).half())
    return torch.cat(parts), labels


def dense_loop(vectors: Tensor, queries: int) -> np.ndarray:
    """(Q, N - Q) distances: dense N x N arrays and loops, k-reciprocal as published."""
    distances = 1 - (vectors @ vectors.T + 1) / 2
    ranks = distances.argsort(dim=1).numpy()
    distances = distances.numpy()
    jaccard = jaccard_loop(distances, ranks, queries, K1, K2)
    return (SHARE * distances[:queries] + (1 - SHARE) * jaccard)[:, queries:]


def jaccard_loop(
    distances: np.ndarray, ranks: np.ndarray, queries: int, k1: int, k2: int
) -> np.ndarray:
    """(Q, N) Jaccard distances of the first rows to all."""
    short = int(np.around(k1 / 2)) + 1

    def reciprocal(row: int, k: int) -> np.ndarray:
        forward = ranks[row, :k]
        return forward[np.where(ranks[forward, :k] == row)[0]]

    encoded = np.zeros_like(distances)
    for row in range(len(distances)):
        members = wide = reciprocal(row, k1 + 1)
        for member in members:
            theirs = reciprocal(member, short)
            if len(np.intersect1d(theirs, members)) > 2 / 3 * len(theirs):
                wide = np.append(wide, theirs)
        wide = np.unique(wide)
        weights = np.exp(-distances[row, wide])
        encoded[row, wide] = weights / weights.sum()
    if k2 > 1:
        expanded = np.zeros_like(encoded)
        for row in range(len(encoded)):
            expanded[row] = encoded[ranks[row, :k2]].mean(axis=0)
        encoded = expanded
    holders = [np.where(encoded[:, column] != 0)[0] for column in range(len(encoded))]
    jaccard = np.zeros_like(distances[:queries])
    for query in range(queries):
        overlap = np.zeros(len(encoded), encoded.dtype)
        for column in np.where(encoded[query] != 0)[0]:
            rows = holders[column]
            overlap[rows] += np.minimum(encoded[query, column], encoded[rows, column])
        jaccard[query] = 1 - overlap / (2 - overlap)
    return jaccard


def tag_loop(query: Tensor, references: Tensor, labels: Tensor) -> Tensor:
    """(VOTES,) the references that vote for one query, which has 31 rows of cosines computed."""
    cosines = references @ query
    near = cosines.topk(NEAR).indices
    theirs = (references[near] @ references.T).topk(NEAR, dim=1).indices
    union = torch.cat([near, theirs.flatten()]).unique()
    local = torch.cat([query[None], references[union]])
    distances = 1 - (local @ local.T + 1) / 2
    ranks = distances.argsort(dim=1).numpy()
    jaccard = torch.ones(len(references))
    jaccard[union] = torch.from_numpy(
        jaccard_loop(distances.numpy(), ranks, 1, 10, 3)[0, 1:]
    )
    scores = 1 - (0.5 * (1 - (cosines + 1) / 2) + 0.5 * jaccard)
    best = scores.topk(VOTES)
    shares: dict[int, float] = {}
    for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        label = int(labels[row])
        shares[label] = shares.get(label, 0.0) + score
    return best.indices


ROWS = [dense_rows, large_rows, tag_rows]
