"""A ground truth, its pictures and networks -> the score of each setup.

<work>/<name>/images/index       a link to the pictures
                    /queries/    what asks: cut out once, or links to whole pictures
              images.csv, lists/, features/
<work>/distractors/              the same of pictures that only distract, for every benchmark
"""

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kit import files
from kit.answers import leave_one_out
from kit.answers.metrics import extraction, places, protocol, results, revisited
from kit.answers.metrics.extraction import Networks
from kit.answers.metrics.ground_truth import GroundTruth, Query
from kit.answers.pictures import Pictures
from kit.answers.retrieval import Scenes
from kit.answers.scene import Scene
from kit.data import crops, lists, sources
from kit.data.readers import UnreadableImage
from kit.features import search, store
from kit.features.search import Neighbours
from kit.features.store import Features
from kit.features.views import Views
from kit.rerank import order
from kit.rerank.chain import Chain

log = logging.getLogger(__name__)

DISTRACTORS = "distractors"
QUERY, INDEX = "query", "index"
MOST = 1 << 26  # places of all rankings together, where a chain ranks the whole index

# 1st place of Google Landmark Retrieval 2019 on Oxford and Paris
VIEWS = Views(1024, "bounded", (2**-0.5, 1.0, 2**0.5), multiple=32, least=32)


@dataclass(frozen=True)
class Benchmark:
    """What asks and what is searched; a ground truth's images are the first of the index."""

    name: str
    truth: GroundTruth
    told: str  # name and hash of its file
    index: Sequence[str]  # paths from the pictures' folder
    asking: Sequence[str]  # path of each query's picture, there too


@dataclass(frozen=True)
class Found:
    """Scores by setup, and what they were measured with."""

    scores: Mapping[str, revisited.Score]
    protocol: protocol.Protocol
    measured: results.Results | None = None  # of labelled pictures
    written: Path | None = None  # metrics.json, and beside it what `results` writes

    def lines(self, name: str) -> list[str]:
        """One line a measure or a setup, and the protocol."""
        if self.measured is not None:
            rows = [*self.measured.lines(name), f"written: {self.written}"]
            return [*rows, f"measured with: {self.protocol}"]
        crop = self.protocol.queries.partition(" ")[2]
        rows = [f"{name} {s:8} {score}, {crop}" for s, score in self.scores.items()]
        return [*rows, f"measured with: {self.protocol}"]


def by_name(truth: GroundTruth, told: str, name: str, folder: Path) -> Benchmark:
    """The benchmark of a ground truth that names pictures by their files, wherever in `folder`.

    Revisited sets are searched in exactly their images; the older ones in all of the folder.
    """
    there: dict[str, str] = {}
    for path in pictures(folder):
        there.setdefault(Path(path).stem, path)
    wanted = [*truth.images, *(query.image for query in truth.queries)]
    missing = [image for image in wanted if image not in there]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no picture {missing[0]} of the ground truth "
            f"({len(missing)} of {len(wanted)} missing)"
        )
    index = [there[image] for image in truth.images]
    if truth.kind == "classic":
        index += sorted(set(there.values()) - set(index))
    asking = [there[query.image] for query in truth.queries]
    return Benchmark(name, truth, told, index, asking)


def by_path(truth: GroundTruth, told: str, name: str) -> Benchmark:
    """The benchmark of a ground truth whose names are paths (kit.answers.metrics.folders)."""
    asking = [query.image for query in truth.queries]
    return Benchmark(name, truth, told, truth.images, asking)


def pictures(folder: Path) -> list[str]:
    """Paths of all pictures below a folder, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = [
        (Path(here) / name).relative_to(folder).as_posix()
        for here, _, names in os.walk(folder)
        for name in names
        if sources.PICTURE.search(name)
    ]
    if not found:
        raise FileNotFoundError(f"{folder}: no picture in it")
    return sorted(found)


def evaluate(
    benchmark: Benchmark,
    images: Path,
    work: Path,
    networks: Networks,
    *,
    whole: bool = False,  # queries are not cropped
    distractors: Path | None = None,  # folder of pictures that are searched besides
    chain: Chain | None = None,  # that reranks; else search alone
    processes: int = 0,  # that verify by local features
) -> Found:
    """Extracts what is missing, ranks the whole index for each query, and scores the rankings."""
    plan = networks.chain(chain)
    if benchmark.name == DISTRACTORS:
        raise ValueError(f"{DISTRACTORS} is a folder's name; call the file another")
    whole_folders = [images] if benchmark.truth.kind == "classic" else []
    for folder in filter(None, [*whole_folders, distractors]):
        if work.resolve().is_relative_to(folder.resolve()):  # crops would be found, too
            raise ValueError(
                f"{work} is in {folder}, whose pictures are all searched; "
                "write to a folder elsewhere"
            )
    out = work / benchmark.name
    asking = [
        _asking(query, images / path, out / "images" / "queries", number, whole)
        for number, (query, path) in enumerate(
            zip(benchmark.truth.queries, benchmark.asking, strict=True)
        )
    ]
    rows = [(f"queries/{name}", QUERY) for name in asking]
    rows += [(f"index/{path}", INDEX) for path in benchmark.index]
    pictures_of = {
        f"queries/{name}": f"index/{path}"
        for name, path in zip(asking, benchmark.asking, strict=True)
        if "_whole" in name
    }
    prepare(out, images, rows, networks, (QUERY, INDEX), pictures_of)
    features, names, more = [out / "features"], list(benchmark.index), 0
    if distractors is not None:
        features.append(work / DISTRACTORS / "features")
        others = pictures(distractors)
        more = len(others)
        rows = [(f"index/{path}", INDEX) for path in others]
        prepare(work / DISTRACTORS, distractors, rows, networks, (INDEX,), {})
        names += others
    ranked = _ranked(benchmark, out, features, plan, processes)
    placed = _placed(benchmark, features, plan, ranked)
    scores = {
        name: revisited.evaluate(placed, setup)
        for name, setup in benchmark.truth.setups.items()
    }
    boxes = any(query.box for query in benchmark.truth.queries)
    crop = protocol.CROPPED if boxes and not whole else protocol.WHOLE
    if (own_rows(benchmark.truth) >= 0).any():
        crop += ", own image left out"
    told = protocol.describe(
        *(out / "features", plan, QUERY, INDEX, benchmark.told, len(asking)),
        crop=crop,
        distractors=more,
    )
    if benchmark.truth.kind != "labels":
        return Found(scores, told)
    first = ranked[:, : results.PLACES]
    measured = results.measure(
        benchmark.asking,
        _classes(benchmark.truth),
        placed,
        *benchmark.truth.setups.values(),
        [[names[row] for row in rows if row >= 0] for rows in first.tolist()],
    )
    made = [step.name for step in plan.steps] or ["search"]
    sha = files.fingerprint(asdict(told))[:8]  # another protocol, another folder
    folder = out / "results" / "-".join([*made, sha])
    path = results.write(measured, benchmark.name, told, folder)
    return Found(scores, told, measured, path)


def prepare(
    out: Path,
    images: Path,
    rows: Sequence[tuple[str, str]],  # path from <out>/images, query or index
    networks: Networks,
    wanted: Sequence[str],
    pictures_of: Mapping[
        str, str
    ],  # of whole queries' paths: that of the same index image
) -> None:
    """Lists of the rows, unless they are there, and features of them; a picture that a table of
    the same folder has shown before is not extracted again.
    """
    root, table, folder = out / "images", out / "images.csv", out / "lists"
    root.mkdir(parents=True, exist_ok=True)
    moved = _link(root / "index", images)
    text = io.StringIO()
    written = csv.writer(text, lineterminator="\n")
    written.writerows([("path", "label", "split"), *((p, "", s) for p, s in rows)])
    listed = all((folder / f"{name}.json").exists() for name in wanted)
    same = table.exists() and table.read_text(encoding="utf-8") == text.getvalue()
    if moved or not (same and listed):
        table.unlink(missing_ok=True)
        part = files.write_text(out / "images.part.csv", text.getvalue())
        lists.build(sources.from_csv(part, root), root, folder, wanted=wanted)
        os.replace(part, table)
    others = [out / "features", *_same_pictures(out, [path for path, _ in rows])]
    for name in sorted(wanted):  # the index first: queries may be among its images
        paths = lists.load(folder, name, ("id", "path")).rows["path"].tolist()
        known_as = [sources.path_id(pictures_of.get(path, path)) for path in paths]
        place = folder, name, root, out / "features"
        extraction.extracted(networks, *place, others, known_as)


def _same_pictures(out: Path, paths: Sequence[str]) -> list[Path]:
    """Features of other tables of the same folder of pictures, made after all of `paths` were."""
    folder = (out / "images" / INDEX).resolve()
    stamps = [_stamp(out / "images" / path) for path in paths]
    newest = max([0, *(stamp[1] for stamp in stamps if stamp)])
    return [
        table.parent / "features"
        for table in sorted(out.parent.glob("*/images.csv"))
        if table.parent != out
        and (table.parent / "images" / INDEX).resolve() == folder
        and table.stat().st_mtime_ns > newest
    ]


def _ranked(
    benchmark: Benchmark,
    out: Path,
    features: Sequence[Path],
    chain: Chain,
    processes: int,
) -> torch.Tensor:
    """Index rows of each query's ranking without its own image, best first; -1 for none.

    (Q, N) of a chain; of search alone the first, where a set of labelled pictures tells them.
    """
    own = own_rows(benchmark.truth)
    if chain.steps:
        return _reranked(out, features, chain, processes, own)
    if benchmark.truth.kind != "labels":
        return torch.empty(len(own), 0, dtype=torch.long)
    stores = [store.load(features[0] / name / QUERY) for name in chain.models]
    lost = ~np.logical_and.reduce([each.readable() for each in stores])
    found, first = [], 0
    for folder in features:
        parts = [store.load(folder / name / INDEX) for name in chain.models]
        near = search.knn(
            stores,
            parts,
            results.PLACES + 1,
            weights=list(chain.models.values()),
            skip=~np.logical_and.reduce([each.readable() for each in parts]),
        )
        found.append(
            Neighbours(near.scores, near.rows.where(near.rows < 0, near.rows + first))
        )
        first += len(parts[0])
    scores, rows = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    rows[rows == torch.from_numpy(own)[:, None]] = order.ABSENT
    rows[torch.from_numpy(lost)] = order.ABSENT
    _, rows = order.sort(scores.masked_fill(rows < 0, -torch.inf), rows)
    return rows[:, : results.PLACES]


def _placed(
    benchmark: Benchmark, features: Sequence[Path], chain: Chain, ranked: torch.Tensor
) -> list[dict[str, np.ndarray]]:
    """Of each query the places of its groups' images."""
    groups = [query.groups for query in benchmark.truth.queries]
    marked = [np.concatenate(list(each.values())) for each in groups]
    if chain.steps:
        found = places.of_rankings(ranked, marked)
    else:
        queries = [store.load(features[0] / name / QUERY) for name in chain.models]
        parts = [
            [store.load(folder / name / INDEX) for folder in features]
            for name in chain.models
        ]
        found = places.count(queries, parts, marked, list(chain.models.values()))
    return [
        dict(
            zip(each, np.split(at, np.cumsum([*map(len, each.values())])), strict=False)
        )
        for each, at in zip(groups, found, strict=True)
    ]


def _classes(truth: GroundTruth) -> list[str]:
    """Labels; where the ground truth tells none, the first image of a query's class."""
    found = []
    for query in truth.queries:
        rows = np.concatenate([query.groups["same"], query.groups["self"]])
        found.append(
            query.label or (truth.images[min(rows)] if len(rows) else query.image)
        )
    return found


def own_rows(truth: GroundTruth) -> np.ndarray:
    """(Q,) index row of each query's own image, which it is not to find; -1 for none."""
    groups = [
        query.groups.get("self", np.empty(0, np.int64)) for query in truth.queries
    ]
    return np.array([rows[0] if len(rows) else -1 for rows in groups], np.int64)


def _reranked(
    out: Path,
    features: Sequence[Path],
    chain: Chain,
    processes: int,
    own: np.ndarray,
) -> torch.Tensor:
    """(Q, N) rows of the whole index; -1 where nothing is left.

    own: of `own_rows`; a query's own image takes part in nothing (kit.answers.leave_one_out).
    """
    shown = {name: lists.load(out / "lists", name) for name in (QUERY, INDEX)}
    scene = Scenes(out / "features", shown[QUERY], shown[INDEX]).of(chain.models)
    for folder in features[1:]:
        scene, shown[INDEX] = _with_distractors(scene, shown[INDEX], out, folder)
    # a table that changed shows other images, whose local features lie elsewhere
    shown = {
        n: replace(each, name=f"{n}-{each.hash[:16]}") for n, each in shown.items()
    }
    pictures = Pictures(out / "images", out / "features" / "local", shown, processes)
    scene = replace(scene, pictures=pictures)
    count = len(scene.models[0].of(INDEX))
    if len(scene) * count > MOST:
        raise ValueError(
            f"a chain would rank {count:,} images for {len(scene):,} queries "
            f"whole; more than {MOST:,} places do not fit, go without it"
        )
    scores, rows = leave_one_out.rank(scene, replace(chain, k=count), own)
    rows = rows.masked_fill(~torch.isfinite(scores), order.ABSENT)
    asking = [model.query.readable() for model in scene.models]
    rows[~torch.from_numpy(np.logical_and.reduce(asking))] = order.ABSENT
    return rows


def _with_distractors(
    scene: Scene, searched: lists.ImageList, out: Path, features: Path
) -> tuple[Scene, lists.ImageList]:
    """The scene and its index with the images of `features` after the others."""
    models = []
    for model in scene.models:
        more = store.load(features / model.name / INDEX)
        models.append(replace(model, index=_joined(model.of(INDEX), more)))
    beside = features.parent
    _link(out / "images" / DISTRACTORS, beside / "images" / INDEX)
    listed = lists.load(beside / "lists", INDEX)
    paths = listed.rows["path"].str.replace(INDEX, DISTRACTORS, n=1, regex=False)
    rows = [searched.rows, listed.rows.assign(path=paths)]
    rows = pd.concat(rows, ignore_index=True).assign(id=models[0].of(INDEX).ids)
    sha = files.fingerprint([searched.hash, listed.hash])
    return (
        replace(scene, models=tuple(models), found={}),
        replace(searched, rows=rows, hash=sha),
    )


def _joined(first: Features, second: Features) -> Features:
    """Two stores of one model, one after the other, in memory; their images get new ids."""
    if first.manifest["model"]["hash"] != second.manifest["model"]["hash"]:
        name = first.manifest["model"]["name"]
        raise ValueError(f"features of distractors are of other weights than {name}'s")
    parts = [first, second]
    vectors = np.concatenate([each.vectors for each in parts])
    readable = np.concatenate([each.readable() for each in parts])
    ids = np.char.mod("%016d", np.arange(len(vectors)))
    manifest = first.manifest | {"unreadable": ids[~readable].tolist()}
    return Features(ids, vectors, manifest)


def _asking(query: Query, source: Path, folder: Path, number: int, whole: bool) -> str:
    """The name in `folder` of what a query asks with; made there unless it is."""
    folder.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if whole or query.box is None:
        name = f"{number:06}_whole{source.suffix}"
        _link(folder / name, source)
        return name
    made = files.fingerprint([str(source), _stamp(source), list(query.box)])
    name = f"{number:06}_{made[:16]}.png"
    if not (folder / name).exists():
        try:
            crops.cut(source, query.box, folder / name)
        except UnreadableImage as error:
            log.warning("query %s cannot be read, it finds nothing: %s", number, error)
    return name


def _stamp(path: Path) -> list[int]:
    """Size and time of a file, which tell whether it is still the same."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _link(link: Path, target: Path) -> bool:
    """Makes `link` lead to `target`; whether it led elsewhere or nowhere."""
    target = target.resolve()
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return False
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return True
