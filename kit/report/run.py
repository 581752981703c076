"""The page of one run: counts, loss curves, gains, and the best and worst queries as pictures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kit.answers import gain_table
from kit.answers.metrics.mean_ap import Score
from kit.answers.metrics.protocol import Protocol
from kit.data import images, lists
from kit.data.readers import UnreadableImage, open_reader
from kit.data.tables import read_solution
from kit.plan import Run
from kit.report.page import Example, Section, collage, curves, gain_chart, page, table
from kit.training import checkpoints

SHOWN = 6  # queries of each kind
RESULTS = 8  # index images a query


def write(
    run: Run,
    score: Score,
    protocol: Protocol,  # what it was measured with
    rankings: Mapping[str, np.ndarray],  # query id -> index ids, best first
    shown: tuple[lists.ImageList, lists.ImageList],  # queries and searched index
    warning: str = "",
) -> Path:
    """One self-contained HTML page, run.report; everything on it was computed before."""
    gains = gain_table.read(run.gains)
    names, public, private, _ = zip(*gains, strict=True)
    last = max(at for at, name in enumerate(names) if not name.startswith("("))
    counts = lists.describe(run.lists)
    worst = score.queries.sort_values(["ap", "id"], kind="stable")
    sections = [
        Section(
            "Gains",
            "mAP@100 after each step. Weights were chosen on the public half; the private half "
            "only reports. Steps in brackets are for comparison and lead nowhere.",
            gain_chart(names, public, private)
            + table(("step", "public", "private", "note"), gains, [last]),
        ),
        Section(
            "Training",
            "Loss of each stage by epoch.",
            _losses(run.runs),
        ),
        Section(
            "Image lists",
            "Rows of every list, and what was dropped on the way to it.",
            table(list(counts.columns), counts.to_numpy().tolist()),
        ),
        Section(
            "Worst queries",
            "Lowest average precision first.",
            _collage(worst.head(SHOWN).itertuples(), rankings, shown, run),
        ),
        Section(
            "Best queries",
            "Highest average precision first.",
            _collage(worst.tail(SHOWN)[::-1].itertuples(), rankings, shown, run),
        ),
    ]
    lead = f"{score}{warning}. Measured with: {protocol}."
    return page(run.report, "Landmark retrieval", lead, sections)


def _losses(runs: Path) -> str:
    """A curve for each stage, in the order in which they were trained."""
    files = sorted(runs.glob("*/log.csv"), key=lambda log: log.stat().st_mtime)
    logs = {each.parent.name: checkpoints.read_log(each.parent) for each in files}
    points = {name: (log["epoch"], log["loss"]) for name, log in logs.items()}
    return curves(points, "epoch", "loss")


def _collage(
    queries: Iterable[Any],  # rows of Score.queries
    rankings: Mapping[str, np.ndarray],
    shown: tuple[lists.ImageList, lists.ImageList],
    run: Run,
) -> str:
    solution = read_solution(run.lists / "solution.csv").set_index("id")["images"]
    places = [
        dict(zip(each.rows["id"], each.rows["path"], strict=True)) for each in shown
    ]
    reader = open_reader(run.data)

    def small(path: str) -> np.ndarray:
        try:
            return images.thumbnail(reader.read(path))
        except UnreadableImage:
            return images.thumbnail(b"")  # grey

    examples = []
    for query in queries:
        results = [image for image in rankings[query.id][:RESULTS].tolist() if image]
        positives = set(solution[query.id].split())
        examples.append(
            Example(
                caption=f"{query.id} · {query.usage} · AP {query.ap:.4f} · "
                f"{query.positives} positives",
                query=small(places[0][query.id]),
                results=[small(places[1][image]) for image in results],
                hits=[image in positives for image in results],
                labels=[f"{place}" for place in range(1, len(results) + 1)],
            )
        )
    return collage(examples)
