"""What an evaluation's number was measured with, in one line beside it.

Two numbers compare only where these agree: the ground truth and its version, the index and how
large it is, whether queries are cropped (which alone is worth several points), what the networks
were trained on, how an image is looked at, and what reranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import files
from kit.answers.metrics import ground_truth
from kit.data import lists
from kit.features import store
from kit.features.views import OWN
from kit.rerank.chain import Chain

SHOWN = 8  # digits of a hash
WHOLE, CROPPED = "whole", "cropped"


@dataclass(frozen=True)
class Protocol:
    """Each part as it is printed."""

    truth: str  # file and hash
    index: str  # list, hash and size
    queries: str  # how many, whole or cropped
    trained: str  # lists that the networks met, each with its hash
    seen: str  # size, shape and scales of an image
    chain: str  # networks and steps
    voters: str = ""  # list of the references, if any vote

    def __str__(self) -> str:
        voters = f"references {self.voters}; " if self.voters else ""
        return (
            f"ground truth {self.truth}; index {self.index}; queries {self.queries}; "
            f"trained on {self.trained}; images {self.seen}; {voters}rerank {self.chain}"
        )


def describe(
    features: Path,
    chain: Chain,
    query: str,
    index: str,
    truth: str,
    asked: int,
    *,
    crop: str = WHOLE,
    whole: int = 0,
    distractors: int = 0,
    voters: lists.ImageList | lists.StoredList | None = None,
) -> Protocol:
    """Reads the stores of two lists by the chain's models, <features>/<model>/<list>.

    truth: of `file` or `of_lists`; asked: queries that count; whole: images of all of GLDv2's
    index where this is to be one; distractors: images that were searched besides.
    """
    models = list(chain.models)
    asking = [store.load(features / model / query).manifest for model in models]
    searched = store.load(features / models[0] / index).manifest
    met: dict[str, str] = {}
    for manifest in asking:
        met |= manifest["seen"]
    steps = "; ".join(map(str, chain.steps)) or "none"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in chain.models.items())
    return Protocol(
        truth,
        _index(searched, whole, distractors),
        f"{asked:,} {crop}",
        ", ".join(named(name, sha) for sha, name in met.items()) or "nothing",
        " and ".join(dict.fromkeys(map(views, asking))),
        f"{steps} (networks {weights})",
        "" if voters is None else named(voters.name, voters.hash),
    )


def file(path: Path) -> str:
    """A ground truth's name with its hash; of a folder, of all files in it."""
    return named(path.name, ground_truth.fingerprint(path))


def of_lists(folder: Path, truth: str = "solution.csv") -> str:
    """The same of the ground truth that was written beside lists, by the name of its source."""
    about = next(iter(sorted(folder.glob("query*.json"))), None)
    sources: Mapping[str, Any] = files.read_json(about)["sources"] if about else {}
    kind = "retrieval" if truth == "solution.csv" else "recognition"
    found = [Path(name).name for name in sources if f"{kind}_solution" in name]
    return named(found[0] if found else truth, files.sha256(folder / truth))


def named(name: str, sha: str) -> str:
    return f"{name} {sha[:SHOWN]}"


def views(manifest: Mapping[str, Any]) -> str:
    """How a store's images were looked at."""
    shape = manifest.get("template", OWN)
    said = [f"{manifest.get('size', 0)} px {shape}"]
    said.append(f"scales {_numbers(manifest.get('scales', [1.0]))}")
    said += [name for name in ("flip", "normalise") if manifest.get(name)]
    return " ".join(said)


def _index(manifest: Mapping[str, Any], whole: int, distractors: int) -> str:
    rows = manifest["rows"]
    told = f"{named(manifest['list']['name'], manifest['list']['hash'])}, {rows:,}"
    if whole and rows != whole:
        told += f" of {whole:,} images (not all of GLDv2)"
    else:
        told += " images"
    return told + (f" and {distractors:,} distractors" if distractors else "")


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
