"""Lists, images and features -> which training images leak what a number is measured on.

`python -m kit.answers.audit --lists DIR --data DIR --out exclusions.csv` compares a training
list with the lists that it must not know: near-duplicates by perceptual hash and, where features
are given, by cosine; landmarks shared by label; landmarks that bear the name of a benchmark's.
Near-duplicates are excluded; with --labels the benchmarks' landmarks are too.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit import files
from kit.answers.duplicates import Found, by_features, by_hash
from kit.data import exclusions, lists, overlap, perceptual
from kit.features import store

log = logging.getLogger(__name__)

SHOWN = 10  # of the most certain pairs, by hash and by features
OWN_LABELS = "gld_v1"  # a list whose labels are no other list's


@dataclass(frozen=True)
class Audit:
    """What is compared with what, and how."""

    lists: Path
    data: Path  # folder that the lists' paths start from
    hashes: Path  # perceptual hashes are kept here, a folder a list
    train: str = "full"
    against: tuple[str, ...] = ("query", "index")
    features: Path | None = None  # features/<model>; None: hashes alone
    least: float = 0.95  # cosine of a near-duplicate
    bits: int = 6  # of its hash that may differ
    benchmarks: tuple[str, ...] = ("roxford", "rparis")
    names: Path = Path("datasets_meta/roxford_rparis.json")  # of their landmarks
    labels: bool = False  # exclude the benchmarks' landmarks, too
    workers: int | None = None  # threads that hash; None: one a core

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:  # 1 would miss what float16 rounds
            raise ValueError(f"least is {self.least}, not a cosine between 0 and 1")
        if self.train in self.against:
            raise ValueError(f"list {self.train} cannot be compared with itself")


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    images: int  # of train
    landmarks: int
    pairs: int | None = None
    excluded: tuple[exclusions.Exclusion, ...] = ()


@dataclass(frozen=True)
class Result:
    """All that was found."""

    findings: list[Finding]
    examples: list[str]  # the most certain pairs, a line each
    about: dict[str, Any]  # how they were found


def run(job: Audit) -> Result:
    """Hashes what is not hashed yet, and compares; refuses train lists with the images themselves."""
    train = lists.find(job.lists, job.train)
    others = [lists.find(job.lists, name) for name in job.against]
    about: dict[str, Any] = {
        "train": {"name": train.name, "hash": train.hash},
        "against": {other.name: other.hash for other in others},
        "bits": job.bits,
    }
    found = _by_hash(job, train, others, about)
    if job.features:
        found |= _by_features(job, train, others, about)
    findings = _duplicates(train, found)
    if job.train == OWN_LABELS:
        log.info("list %s has labels of its own: landmarks not compared", job.train)
    else:
        findings += _shared(job, train) + _named(job, train, about)
    about["findings"] = [
        {
            "what": each.what,
            "pairs": each.pairs,
            "images": each.images,
            "landmarks": each.landmarks,
            "excluded": len(each.excluded),
        }
        for each in findings
    ]
    return Result(findings, _examples(train, others, found), about)


def table(findings: Sequence[Finding]) -> str:
    """One aligned line a finding."""
    head = ("what", "pairs", "images", "landmarks", "excluded")
    rows = [
        (
            each.what,
            "-" if each.pairs is None else f"{each.pairs:,}",
            *(f"{n:,}" for n in (each.images, each.landmarks, len(each.excluded))),
        )
        for each in findings
    ]
    first, *widths = (max(map(len, column)) for column in zip(head, *rows, strict=True))
    return "\n".join(
        f"{what:<{first}}  "
        + "  ".join(f"{n:>{width}}" for n, width in zip(numbers, widths, strict=True))
        for what, *numbers in (head, *rows)
    )


def _earlier(job: Audit, out: Path) -> list[exclusions.Exclusion]:
    """What stands in `out` already, where the lists were built without these images.

    They would not be found again, and the next lists would hold them. All lists are asked: one
    that is cut out of another does not count what that has lost.
    """
    lists.find(job.lists, job.train)
    dropped = [
        files.read_json(path).get("dropped", {}) for path in job.lists.glob("*.json")
    ]
    count = max(
        sum(n for why, n in each.items() if why.startswith(exclusions.DROPPED))
        for each in dropped
    )
    if not count:
        return []
    earlier = exclusions.rows(out) if out.exists() else []
    if len(earlier) < count:
        raise ValueError(
            f"{job.lists} was built without {count} excluded images; give --out the list "
            "that names them, so that they stay excluded, or build the lists without one"
        )
    log.info("%d images of %s stay excluded", len(earlier), out)
    return earlier


def _by_hash(
    job: Audit,
    train: lists.StoredList,
    others: Sequence[lists.StoredList],
    about: dict[str, Any],
) -> dict[tuple[str, str], Found]:
    """What looks alike, by the other list and the way it was found."""
    ours, *theirs = (
        perceptual.build(job.data, each, job.hashes / each.name, job.workers)
        for each in (train, *others)
    )
    about["hashed"] = {
        each.manifest["list"]["name"]: each.manifest["counts"]
        for each in (ours, *theirs)
    }
    found = {}
    for other in theirs:
        name = other.manifest["list"]["name"]
        same = ours.ids[np.isin(ours.ids, other.ids)]
        if len(same):
            raise ValueError(
                f"list {train.name} holds {len(same)} images of {name} itself, such as "
                f"{same[0]}; audit full, or a holdout list"
            )
        how = f"perceptual hash, {job.bits} bits"
        found[name, how] = by_hash(ours, other, job.bits)
    return found


def _by_features(
    job: Audit,
    train: lists.StoredList,
    others: Sequence[lists.StoredList],
    about: dict[str, Any],
) -> dict[tuple[str, str], Found]:
    """The same, by the features of one model."""
    ours = store.expect(store.load(job.features / train.name), list_hash=train.hash)
    model = ours.manifest["model"]
    about |= {"features": model, "least": job.least}
    found = {}
    for other in others:
        theirs = store.load(job.features / other.name)
        store.expect(theirs, list_hash=other.hash, model_hash=model["hash"])
        how = f"features of {model['name']}, cosine {job.least}"
        found[other.name, how] = by_features(ours, theirs, job.least)
    return found


def _duplicates(
    train: lists.StoredList, found: Mapping[tuple[str, str], Found]
) -> list[Finding]:
    ids = {one for each in found.values() for one in each.ids.tolist()}
    label = _column(train, "label", ids)
    findings = []
    for (name, how), each in found.items():
        reason = f"near-duplicate of {name}"
        rows = tuple(
            exclusions.Exclusion(one, reason, of)
            for one, of in zip(each.ids.tolist(), each.of.tolist(), strict=True)
        )
        count = len({label[row.id] for row in rows} - {-1})
        what = f"near-duplicates of {name} ({how})"
        findings.append(Finding(what, len(rows), count, each.pairs, rows))
    return findings


def _shared(job: Audit, train: lists.StoredList) -> list[Finding]:
    """Landmarks of train that the other lists show, by label; they are only counted."""
    findings = []
    for name in job.against:
        if name == OWN_LABELS:
            log.info("list %s has labels of its own: landmarks not compared", name)
            continue
        known, seen, images = overlap.known_labels(job.lists, name), set(), 0
        for rows in train.blocks(("label",)):
            own = rows.loc[rows["label"].isin(known), "label"]
            images += len(own)
            seen.update(own.unique())
        findings.append(Finding(f"landmarks of {name}, by label", images, len(seen)))
    return findings


def _named(job: Audit, train: lists.StoredList, about: dict[str, Any]) -> list[Finding]:
    """Landmarks whose category has the name of a benchmark's landmark, whole or as a part."""
    if not job.benchmarks:
        return []
    landmarks = overlap.read_benchmarks(job.names, job.benchmarks)
    found = overlap.matches(overlap.read_categories(job.data, job.lists), landmarks)
    labels = overlap.labels_of(job.lists, [each.landmark_id for each in found])
    found = [each for each in found if each.landmark_id in labels]
    about["benchmarks"] = {
        "names": files.sha256(job.names),
        "matches": [each._asdict() for each in found],
    }
    findings = []
    for name in dict.fromkeys(job.benchmarks):
        for whole, how in ((True, "by name"), (False, "by a part of the name")):
            own = {
                labels[each.landmark_id]: each.of
                for each in found
                if each.whole == whole and each.of.startswith(f"{name}/")
            }
            rows = tuple(_labelled(train, own, f"landmark of {name}"))
            what, count = f"landmarks of {name}, {how}", len(own)
            left_out = rows if whole and job.labels else ()
            findings.append(Finding(what, len(rows), count, None, left_out))
    return findings


def _labelled(
    train: lists.StoredList, of: Mapping[int, str], reason: str
) -> Iterable[exclusions.Exclusion]:
    """Every image of some labels; of: the landmark that each collides with."""
    for rows in train.blocks(("id", "label")):
        some = rows[rows["label"].isin(of)]
        for one, label in zip(some["id"], some["label"], strict=True):
            yield exclusions.Exclusion(one, reason, of[label])


def _examples(
    train: lists.StoredList,
    others: Sequence[lists.StoredList],
    found: Mapping[tuple[str, str], Found],
) -> list[str]:
    """The most certain pairs by path, those by hash before those by features."""
    pairs: dict[bool, list[tuple[float, str, str, str]]] = {True: [], False: []}
    for (name, how), each in found.items():
        most = np.argsort(-each.certainty, kind="stable")[:SHOWN].tolist()
        pairs[how.startswith("perceptual")] += [
            (float(each.certainty[n]), str(each.ids[n]), name, str(each.of[n]))
            for n in most
        ]
    best = [
        pair
        for some in pairs.values()
        for pair in sorted(some, key=lambda pair: -pair[0])[:SHOWN]
    ]
    ours = _column(train, "path", {pair[1] for pair in best})
    theirs = {
        each.name: _column(
            each, "path", {of for *_, name, of in best if name == each.name}
        )
        for each in others
    }
    return [
        f"{f'{-score:.0f} bits' if score <= 0 else f'cosine {score:.4f}'}  "
        f"{ours[one]}  {theirs[name][of]}"
        for score, one, name, of in best
    ]


def _column(listed: lists.StoredList, column: str, ids: set[str]) -> dict[str, Any]:
    """A column's values for some images of a list; of an image's rows the first."""
    found: dict[str, Any] = {}
    if not ids:
        return found
    for rows in listed.blocks(("id", column)):
        some = rows[rows["id"].isin(ids)]
        for one, value in zip(some["id"], some[column], strict=True):
            found.setdefault(one, value)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kit.answers.audit",
        description="Find training images that leak what is measured.",
    )
    add, default = parser.add_argument, Audit
    add("--lists", type=Path, required=True, help="folder of the lists")
    add("--data", type=Path, required=True, help="folder that their paths start from")
    add("--out", type=Path, required=True, help="the exclusion list, a .csv")
    add("--hashes", type=Path, help="perceptual hashes (default: beside the lists)")
    add("--train", default=default.train, help="list that is trained on")
    add("--against", nargs="+", default=default.against, help="lists it must not know")
    add("--features", type=Path, help="features/<model>, of all these lists")
    add("--least", type=float, default=default.least, help="cosine of near-duplicates")
    add("--bits", type=int, default=default.bits, help="of their hashes that differ")
    add("--benchmarks", nargs="*", default=default.benchmarks, help="in --names")
    add("--names", type=Path, default=default.names, help="names of their landmarks")
    add("--labels", action="store_true", help="exclude the benchmarks' landmarks, too")
    add("--workers", type=int, help="threads that hash (default: one a core)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    out = given.pop("out")
    given["hashes"] = given["hashes"] or given["lists"].parent / "hashes"
    for name in ("against", "benchmarks"):
        given[name] = tuple(given[name])
    try:
        exclusions.refuse_place(out)  # before hours of work
        job = Audit(**given)
        earlier = _earlier(job, out)
        result = run(job)
        found = [row for each in result.findings for row in each.excluded]
        exclusions.write(out, [*earlier, *found], result.about)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"audit: {error}")
    print(table(result.findings))
    for line in result.examples:
        print(line)
    left_out = len({row.id for row in (*earlier, *found)})
    print(f"{out}: {left_out} images")


if __name__ == "__main__":
    main()
