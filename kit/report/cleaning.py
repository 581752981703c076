"""The page of one cleaning: what stays, what decided it, and examples of what stays and what goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kit.answers.cleaning.calibrate import Curve
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Kept, Rule
from kit.answers.cleaning.verified import Verified
from kit.answers.cleaning.votes import Poll
from kit.data import images
from kit.data.readers import Reader, UnreadableImage, open_reader
from kit.report.page import Example, Section, collage, curves, page, table

SHOWN = 8  # images of each kind
NEIGHBOURS = 8  # beside each
TAIL = 3  # a curve ends at so many times what is asked for


@dataclass(frozen=True)
class Beside:
    """What stands beside an image: rows of the list, whether they speak for it, what is under them."""

    caption: str
    rows: np.ndarray
    hits: np.ndarray
    labels: list[str]


def write(
    path: Path,
    given: Labelled,
    kept: Kept,
    data: Path,
    sections: list[Section],
    found: Verified | Poll,
    rule: Rule,
    seed: int = 0,
) -> Path:
    """sections: what decided it, made by `decided`; examples of each outcome are drawn at random."""
    reader, rng = open_reader(data), np.random.default_rng(seed)
    shown = [_outcome(given, kept)]
    for title, text, which, beside in _kinds(given, kept, found, rule):
        rows = np.flatnonzero(which)
        rows = np.sort(rng.choice(rows, min(SHOWN, len(rows)), replace=False))
        examples = _examples(given, rows, beside(rows), reader)
        shown.append(Section(title, text, collage(examples)))
    lead = (
        f"List {given.images.name}: {int(kept.images.sum()):,} of {len(given):,} images "
        "stay."
    )
    return page(path, "Cleaned labels", lead, [shown[0], *sections, *shown[1:]])


def decided(
    rule: Rule,
    curve: Curve | None = None,
    grid: Sequence[Sequence[int]] | None = None,
    poll: Poll | None = None,
) -> list[Section]:
    """Sections that show the numbers behind the decision, those that there are.

    grid: the rows of `kit.answers.cleaning.rule.grid`.
    """
    sections = []
    if poll is not None:
        ranked = np.sort(poll.agreement)[::-1]
        points = np.linspace(0, len(ranked) - 1, min(len(ranked), 500)).astype(int)
        text = (
            f"Agreement of each image with its label, best first; {poll.least:.3f} is "
            f"enough. Voters round by round: {', '.join(f'{n:,}' for n in poll.voters)}."
        )
        if rule.mode == "inliers":
            text += " Here they only say which images calibrate."
        series = {
            "agreement": (points + 1, ranked[points]),
            "enough": ([1, len(ranked)], [poll.least] * 2),
        }
        sections.append(Section("Votes", text, curves(series, "images", "agreement")))
    if curve is not None:
        text = (
            f"Share of the pairs that is accepted from so many inliers on: "
            f"{curve.pairs[0]:,} pairs of one landmark, {curve.pairs[1]:,} of two that "
            f"look alike. {rule.min_inliers} are asked for here; 30 was published for DELF."
        )
        there = curve.least <= TAIL * rule.min_inliers
        series = {
            "one landmark": (curve.least[there], curve.true[there]),
            "two landmarks": (curve.least[there], curve.false[there]),
            "asked for": ([rule.min_inliers] * 2, [0, 1]),
        }
        sections.append(
            Section("Inliers", text, curves(series, "least inliers", "accepted"))
        )
    if grid is not None:
        text = (
            "Landmarks and images that stay, by how many candidates must confirm an image "
            "and the inliers that it takes."
        )
        header, rows, own = _sizes(grid, rule)
        sections.append(Section("Sizes", text, table(header, rows, own)))
    return sections


def _outcome(given: Labelled, kept: Kept) -> Section:
    labels = given.labels
    rows = [
        ("in the list", len(np.unique(labels[labels >= 0])), len(given)),
        ("kept", len(np.unique(labels[kept.images])), int(kept.images.sum())),
    ]
    for reason, dropped in kept.dropped.items():
        rows.append((f"dropped: {reason}", None, int(dropped.sum())))
    text = "A landmark counts where an image of it is left."
    return Section("Outcome", text, table(("images", "landmarks", "count"), rows, [1]))


def _sizes(
    grid: Sequence[Sequence[int]], rule: Rule
) -> tuple[list[str], list[list[object]], list[int]]:
    """A column a number of inliers, a row a number of neighbours; which row is the rule's."""
    cells = {
        (least, count): f"{landmarks:,} · {images:,}"
        for least, count, landmarks, images in grid
    }
    inliers, neighbours = (
        list(dict.fromkeys(each)) for each in zip(*cells, strict=True)
    )
    rows = [[n, *(cells[least, n] for least in inliers)] for n in neighbours]
    own = [at for at, n in enumerate(neighbours) if n == rule.min_neighbours]
    return ["neighbours", *(f"{least} inliers" for least in inliers)], rows, own


def _kinds(
    given: Labelled, kept: Kept, found: Verified | Poll, rule: Rule
) -> list[tuple[str, str, np.ndarray, Callable[[np.ndarray], list[Beside]]]]:
    def nearest(rows: np.ndarray) -> list[Beside]:
        return _nearest(given, rows, found if isinstance(found, Poll) else None)

    told, beside = "Beside each its nearest; a hit bears its label.", nearest
    if isinstance(found, Verified):
        told = (
            f"Beside each its candidates; a hit has {rule.min_inliers} inliers with it."
        )

        def beside(rows: np.ndarray) -> list[Beside]:
            return _verified(given, rows, found, rule)

    alone = kept.dropped["no neighbour of its landmark"]
    return [
        ("Dropped", told, kept.dropped["not confirmed"], beside),
        ("Kept", told, kept.images, beside),
        ("Alone", "None of its neighbours is of its landmark.", alone, nearest),
    ]


def _nearest(given: Labelled, rows: np.ndarray, poll: Poll | None) -> list[Beside]:
    landmarks = given.images.rows["landmark_id"].to_numpy()
    found = []
    for row in rows:
        near = given.graph.rows[row, :NEIGHBOURS]
        there = near >= 0
        near, cosines = near[there], given.graph.scores[row, :NEIGHBOURS][there]
        pairs = zip(cosines, landmarks[near], strict=True)
        told = "" if poll is None else f" · agreement {poll.agreement[row]:.3f}"
        hits = given.labels[near] == given.labels[row]
        labels = [f"{cosine:.2f} · {landmark}" for cosine, landmark in pairs]
        found.append(Beside(told, near, hits, labels))
    return found


def _verified(
    given: Labelled, rows: np.ndarray, verified: Verified, rule: Rule
) -> list[Beside]:
    found = []
    for row, counts in zip(rows, verified.inliers(rows), strict=True):
        there = verified.candidates[row] >= 0
        enough = counts[there] >= rule.min_inliers
        near = verified.candidates[row][there][:NEIGHBOURS]
        told = f" · {int(enough.sum())} of {int(there.sum())} candidates confirm it"
        labels = [f"{count} inliers" for count in counts[there][:NEIGHBOURS]]
        found.append(Beside(told, near, enough[:NEIGHBOURS], labels))
    return found


def _examples(
    given: Labelled, rows: np.ndarray, beside: list[Beside], reader: Reader
) -> list[Example]:
    table = given.images.rows

    def small(row: int) -> np.ndarray:
        try:
            return images.thumbnail(reader.read(table["path"].iloc[row]))
        except UnreadableImage:
            return images.thumbnail(b"")  # grey

    return [
        Example(
            caption=f"{table['id'].iloc[row]} · landmark {table['landmark_id'].iloc[row]}"
            + each.caption,
            query=small(row),
            results=[small(near) for near in each.rows],
            hits=each.hits.tolist(),
            labels=each.labels,
        )
        for row, each in zip(rows, beside, strict=True)
    ]
