"""Lists, graphs and pictures that the tests of cleaning share."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from kit import checksums
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.verified import Verified
from kit.data.lists import ImageList
from kit.features.graph import Graph
from kit.features.store import Features


def image_list(labels, name: str = "full", paths=None) -> ImageList:
    """Ids that look like numbers; landmark ids that are not the labels."""
    labels = np.asarray(labels)
    ids = [f"{number:016d}" for number in range(len(labels))]
    rows = {
        "id": ids,
        "path": ids if paths is None else paths,
        "landmark_id": [str(900 - label) if label >= 0 else "-1" for label in labels],
        "label": labels,
    }
    return ImageList(name, pd.DataFrame(rows), f"hash of {name}")


def near(vectors: np.ndarray, k: int) -> Graph:
    """Exact neighbours, ties to the lower row; -1 where there are no more."""
    cosines = (vectors @ vectors.T).astype(np.float32)
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]
    scores = np.take_along_axis(cosines, order, axis=1)
    left = ((0, 0), (0, k - order.shape[1]))
    rows = np.pad(order.astype(np.int32), left, constant_values=-1)
    return Graph(rows, np.pad(scores, left, constant_values=-np.inf))


def features(images: ImageList, vectors: np.ndarray) -> Features:
    about = {
        "model": {"name": "clean", "hash": "hash of a model"},
        "list": {"name": images.name, "hash": images.hash},
        "rows": len(vectors),
        "unreadable": [],
    }
    return Features(images.ids, vectors.astype(np.float16), about)


def walked(given: Labelled, most: int) -> np.ndarray:
    """(N, most): walks each image's neighbours from the best one on."""
    labels = given.images.rows["label"].tolist()
    found = np.full((len(labels), most), -1)
    for image, neighbours in enumerate(given.graph.rows.tolist()):
        taken = [
            other
            for other in neighbours
            if other >= 0
            and other != image
            and labels[image] >= 0
            and labels[other] == labels[image]
        ][:most]
        found[image, : len(taken)] = taken
    return found


def stored(folder: Path, found: np.ndarray, inliers: np.ndarray) -> Verified:
    """The format of `verified`: candidates (N, most) and inliers (N, N), symmetric, in 3 blocks."""
    whose: dict[tuple[int, int], int] = {}
    for image, others in enumerate(found.tolist()):
        for other in others:
            if other >= 0:
                pair = min(image, other), max(image, other)
                whose[pair] = whose.get(pair, 0) + (1 if image < other else 2)
    rows = [(a, b, inliers[a, b], whose[a, b]) for a, b in sorted(whose)]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "candidates.npy", found.astype(np.int32))
    parts = np.array_split(np.array(rows, np.int32).reshape(-1, 4), 3)
    for number, part in enumerate(parts):
        np.save(folder / f"{number:05d}.npy", part)
    about = {"complete": True, "blocks": 3, "pairs": len(rows)}
    names = [path.name for path in folder.glob("*.npy")]
    about["checksums"] = checksums.compute_checksums(folder, names)
    checksums.write_manifest(folder / "manifest.json", about)
    return Verified(folder)


def random_inliers(seed: int, images: int) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(0, 60, (images, images))
    return np.maximum(counts, counts.T)


def random_given(seed: int, images: int = 60, labels: int = 6, k: int = 20) -> Labelled:
    """Unit vectors of few directions, so that many cosines tie; some images have no label."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (images, 3)) + np.array([0, 0, 2.0])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Labelled(image_list(rng.integers(-1, labels, images)), near(vectors, k))


def scene(seed: int, size=(120, 160)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), 128, np.uint8)
    for _ in range(90):
        x, y = int(rng.integers(size[1])), int(rng.integers(size[0]))
        colour, side = rng.integers(0, 256, 3).tolist(), int(rng.integers(3, 16))
        cv2.rectangle(image, (x, y), (x + side, y + 2 * side), colour, -1)
    return cv2.GaussianBlur(image, (0, 0), 0.7)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> tuple[Path, ImageList, Graph]:
    """Photos of 6 landmarks in turn, 2 to 9 of each, seen from several places.

    The last one of each landmark shows something else; one file is cut short.
    """
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    sizes = [9, 2, 5, 4, 7, 3]
    labels = rng.permutation(np.repeat(range(6), sizes))
    seen = np.zeros(6, int)
    vectors = rng.normal(size=(len(labels), 8)) / 4
    paths = []
    for number, label in enumerate(labels):
        seen[label] += 1
        wrong = seen[label] == sizes[label]
        picture = scene(100 + number if wrong else label)
        turn = cv2.getRotationMatrix2D((80, 60), float(rng.uniform(-12, 12)), 1.0)
        picture = cv2.warpAffine(picture, turn, (160, 120), borderValue=128)
        paths.append(f"{number:02d}.png")
        cv2.imwrite(str(folder / paths[-1]), picture)
        vectors[number, label] += 0.2 if wrong else 1
    cut = folder / paths[int(np.flatnonzero(labels == 0)[0])]
    cut.write_bytes(cut.read_bytes()[:200])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    graph = near(vectors, 40)
    np.savez(folder / "given.npz", labels=labels, rows=graph.rows, scores=graph.scores)
    return restored(folder)


def restored(folder: Path) -> tuple[Path, ImageList, Graph]:
    """`pictures`, also in another process."""
    with np.load(folder / "given.npz", allow_pickle=False) as given:
        labels, graph = given["labels"], Graph(given["rows"], given["scores"])
    paths = [f"{number:02d}.png" for number in range(len(labels))]
    return folder, image_list(labels, paths=paths), graph
