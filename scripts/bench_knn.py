"""Rows of `bench.py knn`: exact neighbours, ours and the plain ways, and their memory.

The vectors are synthetic: class centres, the classes as uneven as real ones, and noise.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.features import screen, store
from kit.features.search import knn
from kit.features.store import Features
from kit.rerank.landmark_country import Tags, Weights, addends, vote

DIM, QUERIES, ROWS_OF_ALL, BLOCK = 512, 1129, 1_000_000, 16_384
PER_CLASS, TAIL = 20, 0.6  # images a class on average; its size falls as rank^-0.6
SAMPLE = 8  # queries of the slowest baseline
ALLOWED_MB = 600
TAGGED_ROWS, TAGGED_SAMPLE = 400_000, 48  # of the landmark-country rerank
ON_GPU = ((1129, 4_830_000, 100), (76_000, 4_830_000, 1))  # queries, rows, k
COUNTRIES, LARGEST = 150, 0.17  # and the share of the largest


def knn_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """Against the machine's bf16 gemm, faiss, and one query at a time."""
    size = ROWS_OF_ALL // 10 if bench.quick else ROWS_OF_ALL
    with searched(size) as (query, features, *_):
        copies = {"bf16 copy": features, "fp16 store alone": features.vectors}
        gemm = partial(gemm_of, query, features)
        for (name, database), goal in zip(copies.items(), (0.6, 0.4), strict=True):
            ours_s, gemm_s = bench.interleaved(partial(knn, query, database, 3), gemm)
            what = f"knn k=3, {QUERIES} x {size}, {name} / gemm"
            yield bench.row(what, gemm_s / ours_s, goal, False, ours_s, gemm_s)
        yield from faiss_rows(bench, query, copies, size)
        held = torch.cat(list(features.blocks()))
        ours_s, theirs_s = bench.interleaved(
            partial(knn, query, features, 100), partial(one_by_one, query, held)
        )
        theirs_s *= QUERIES / SAMPLE
        what = f"knn k=100, {QUERIES} x {size} / {SAMPLE} matvec + argsort, scaled"
        yield bench.speed(what, ours_s, theirs_s, 80, False)
        expected = one_by_one(query, held)
        found = knn(query, features, 100).rows[:SAMPLE]
        agree("matvec + argsort", found, torch.stack(expected)[:, :100])


def faiss_rows(
    bench: Any, query: Tensor, copies: dict[str, Any], size: int
) -> Iterator[dict[str, Any]]:
    try:
        import faiss
    except ImportError:
        yield bench.missing(f"knn k=100, {QUERIES} x {size} / faiss", "no faiss here")
        return
    index = faiss.IndexFlatIP(DIM)
    for rows in copies["bf16 copy"].blocks():
        index.add(rows.numpy())
    theirs = partial(index.search, query.float().numpy(), 100)
    expected = torch.from_numpy(theirs()[1])
    for (name, database), goal in zip(copies.items(), (3.0, 2.0), strict=True):
        agree("faiss", knn(query, database, 100).rows, expected)
        ours_s, theirs_s = bench.interleaved(partial(knn, query, database, 100), theirs)
        what = f"knn k=100, {QUERIES} x {size}, {name} / faiss"
        yield bench.speed(what, ours_s, theirs_s, goal, False)


def memory_rows(bench: Any) -> Iterator[dict[str, Any]]:
    size = ROWS_OF_ALL // 10 if bench.quick else ROWS_OF_ALL
    with searched(size) as (query, features, *_):
        for name, database in (("bf16 copy", features), ("fp16", features.vectors)):
            used = grown(partial(knn, query, database, 100))
            what = (
                f"knn k=100, {QUERIES} x {size}, {name}: {ALLOWED_MB} / {used:.0f} MB"
            )
            yield bench.row(what, ALLOWED_MB / used, 1.0, False)


def growth_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """The time over the gemm's at four lengths; the smallest over the largest of these."""
    whole = 2 * ROWS_OF_ALL // (10 if bench.quick else 1)
    shares = []
    with searched(whole) as (query, features, *_):
        for size in (whole // 8, whole // 4, whole // 2, whole):
            rows = features.vectors[:size]
            ours_s, gemm_s = bench.interleaved(
                partial(knn, query, rows, 3), partial(gemm_of, query, features, size)
            )
            shares.append(ours_s / gemm_s)
            print(
                f"    {size} rows: {ours_s:.3f} s, {shares[-1]:.2f} of the gemm's time"
            )
    what = f"knn k=3, growth over {whole // 8} to {whole} rows, fp16"
    yield bench.row(what, min(shares) / max(shares), 0.75, False)


def gpu_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """The largest searches of both systems, as share of the GPU's own bf16 gemm rate."""
    for queries, size, k in ON_GPU:
        what = f"knn k={k}, {queries} x {size} on a GPU / gemm"
        if not torch.cuda.is_available():
            yield bench.missing(what, "no GPU here")
            continue
        with searched(size // (10 if bench.quick else 1), queries) as (
            query,
            features,
            *_,
        ):
            ours = partial(knn, query, features, k, devices=["cuda"])
            gemm = partial(gemm_on_gpu, query, len(features))
            ours_s, gemm_s = bench.interleaved(ours, gemm)
        yield bench.row(what, gemm_s / ours_s, 0.4, False, ours_s, gemm_s)


def gemm_on_gpu(query: Tensor, size: int) -> None:
    rows = torch.randn(BLOCK, DIM, device="cuda", dtype=torch.bfloat16)
    columns = query.bfloat16().T.contiguous().cuda()
    scores = torch.empty(BLOCK, len(query), device="cuda", dtype=torch.bfloat16)
    for _ in range(0, size, BLOCK):
        torch.mm(rows, columns, out=scores)
    torch.cuda.synchronize()


def landmark_country_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """From the votes to the best 100; no (Q, N) matrix on our side."""
    size = TAGGED_ROWS // (10 if bench.quick else 1)
    weights = Weights(1.0, 0.1)
    with searched(size) as (query, features, query_labels, index_labels):
        tags = tagged(query_labels, index_labels)
        held = torch.cat(list(features.blocks()))

        def ours() -> Tensor:
            return knn(query, features, 100, addends=addends(tags, weights)).rows

        def theirs() -> list[np.ndarray]:
            few = query[:TAGGED_SAMPLE].float()
            return boosted((few @ held.T).numpy(), tags, weights)

        expected = torch.from_numpy(np.stack(theirs())[:, :100])
        same = (ours()[:TAGGED_SAMPLE] == expected).float().mean()
        if same < 0.999:  # float32 scores of the loop tie, or nearly, now and then
            raise RuntimeError(f"landmark-country: {same:.4f} of the places are equal")
        ours_s, theirs_s = bench.interleaved(ours, theirs)
        theirs_s *= QUERIES / TAGGED_SAMPLE
        what = (
            f"landmark-country + top-100, {QUERIES} x {size}, loop on {TAGGED_SAMPLE}"
        )
        yield bench.speed(what, ours_s, theirs_s, 15, False)


def tagged(query_labels: Tensor, index_labels: Tensor) -> Tags:
    """Votes of three references, the first for the query's own landmark, and the countries of
    landmarks; one index image of ten is tagged wrongly.
    """
    draw = torch.Generator().manual_seed(1)
    count = int(index_labels.max()) + 1
    shares = torch.arange(1, COUNTRIES + 1).double() ** -1.0
    shares = shares / shares[1:].sum() * (1 - LARGEST)
    shares[0] = LARGEST
    country_of = torch.multinomial(shares, count, True, generator=draw)
    others = torch.randint(count, (len(query_labels), 2), generator=draw)
    voted = torch.cat([query_labels[:, None], others], dim=1)
    scores = torch.rand(voted.shape, generator=draw).sort(dim=1, descending=True).values
    wrong = torch.rand(len(index_labels), generator=draw) < 0.1
    strange = torch.randint(count, index_labels.shape, generator=draw)
    index = torch.where(wrong, strange, index_labels)
    return Tags(
        vote(scores, voted), vote(scores, country_of[voted]), index, country_of[index]
    )


def boosted(scores: np.ndarray, tags: Tags, weights: Weights) -> list[np.ndarray]:
    """The baseline, as published: a query's scores gain where a whole row of tags is equal to one
    of its own, tag by tag, and all of them are sorted.
    """
    ranked = []
    index = tags.index_landmark.numpy(), tags.index_country.numpy()
    votes = tags.query_landmark, tags.query_country
    for number, row in enumerate(scores):
        for about, given, weight in zip(
            index, votes, (weights.landmark, weights.country), strict=True
        ):
            for label, share in zip(
                given.labels[number].tolist(),
                given.weights[number].tolist(),
                strict=True,
            ):
                if share > 0:
                    row[about == label] += weight * share
        ranked.append(np.argsort(-row))
    return ranked


@contextmanager
def searched(
    rows: int, queries: int = QUERIES
) -> Iterator[tuple[Tensor, Features, Tensor, Tensor]]:
    """Queries and a store with its screening copy, in a folder that lasts as long; their labels."""
    draw = torch.Generator().manual_seed(0)
    classes = rows // PER_CLASS
    centres = torch.nn.functional.normalize(torch.randn(classes, DIM, generator=draw))
    shares = torch.arange(1, classes + 1).double().pow(-TAIL)

    def images(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(shares, count, True, generator=draw)
        noise = torch.randn(count, DIM, generator=draw) / DIM**0.5
        return torch.nn.functional.normalize(centres[labels] + noise).half(), labels

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.char.zfill(np.arange(rows).astype("U16"), 16)
        about = {"model": {"name": "noise"}, "list": {"name": "noise"}, "seen": {}}
        store.create(folder, ids, DIM, BLOCK, about)
        writer, owners = store.Writer(folder), []
        for number, start in enumerate(range(0, rows, BLOCK)):
            vectors, labels = images(min(BLOCK, rows - start))
            writer.write(number, vectors.numpy())
            owners.append(labels)
        store.finish(folder)
        screen.build(folder)
        query, labels = images(queries)
        yield query, store.load(folder), labels, torch.cat(owners)


def gemm_of(query: Tensor, features: Features, size: int | None = None) -> None:
    """Every product in bfloat16 and nothing else."""
    rows = screen.of(features).rows[:size]
    columns = query.bfloat16().T.contiguous()
    scores = torch.empty(BLOCK, len(query), dtype=torch.bfloat16)
    for block in rows.split(BLOCK):
        torch.mm(block, columns, out=scores[: len(block)])


def one_by_one(query: Tensor, held: Tensor) -> list[Tensor]:
    """One product with the whole database and one full sort a query, in float32."""
    return [(held @ one).argsort(descending=True) for one in query[:SAMPLE].float()]


def agree(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuses sets that differ in more than what float32 cannot tell apart."""
    same = (found.sort(dim=1).values == expected.sort(dim=1).values).float().mean()
    if same < 0.999:
        raise RuntimeError(f"{name} finds other neighbours: {same:.4f} are the same")


def grown(function: Callable[[], object]) -> float:
    """MB by which the process's anonymous memory grows at most during the call."""
    before, seen, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(max(seen), 1.0)


def anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    raise RuntimeError("/proc/self/status tells no RssAnon")


ROWS = [memory_rows, knn_rows, growth_rows, landmark_country_rows, gpu_rows]
