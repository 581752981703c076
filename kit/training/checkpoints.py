"""What a stage leaves behind: weights, classifier, stage.json, log.csv, and how to go on.

runs/<recipe>/<stage>/model.safetensors, model.json   the network (kit.models.net)
                      head.safetensors                the classifier, for the next stage
                      stage.json                      what made them; written last
                      log.csv                         loss and learning rate by step
                      resume/state.pt                 while the stage is unfinished
"""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kit
from kit import files
from kit.models import net as nets
from kit.models.weights import load_strictly, write_weights

LOG = ("step", "epoch", "loss", "lr", "images_per_second")


def prepare(folder: Path, config: str) -> bool:
    """Whether `folder` holds the whole result of the stage with this fingerprint.

    If not, what another configuration left there is removed. For one process at a time.
    """
    about = folder / "stage.json"
    if about.exists() and files.read_json(about)["fingerprint"] == config:
        weights = folder / "model.safetensors"
        whole = weights.exists() and (folder / "head.safetensors").exists()
        if whole and files.sha256(weights) == nets.describe(folder)["hash"]:
            return True
    if load_state(folder, config) is None:
        clear(folder)
    return False


def save_state(folder: Path, config: str, state: Mapping[str, Any]) -> None:
    """Everything needed to go on: modules, optimizer, scaler, step, log; replaces the last one."""
    path = folder / "resume" / "state.pt"
    with files.replacing(path) as temporary:
        try:
            torch.save({"fingerprint": config, **state}, temporary)
        except RuntimeError as error:  # of its archive writer, whatever the disk said
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{path}: not written ({reason}); is the disk full?"
            ) from None


def load_state(folder: Path, config: str) -> dict[str, Any] | None:
    """The last saved state of the stage with this fingerprint, or None."""
    path = folder / "resume" / "state.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state if state["fingerprint"] == config else None


def clear(folder: Path) -> None:
    """Removes an earlier result of another configuration; stage.json first, it makes it valid."""
    for name in (
        "stage.json",
        "model.json",
        "model.safetensors",
        "head.safetensors",
        "log.csv",
    ):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "resume", ignore_errors=True)


def save_result(
    folder: Path,
    network: nets.EmbeddingNet,
    head: nn.Module,
    about: Mapping[str, Any],
    seen: dict[str, str],
) -> Path:
    """Writes the stage's result, stage.json last, and removes the resume state."""
    nets.save(network, folder, seen)
    write_weights(folder / "head.safetensors", head.state_dict())
    files.write_json(folder / "stage.json", {**about, "kit": kit.__version__})
    shutil.rmtree(folder / "resume", ignore_errors=True)
    return folder


def hand_over(
    folder: Path, network: nets.EmbeddingNet, head: nn.Module
) -> dict[str, str]:
    """Loads the stage saved in `folder` into a network and a classifier; returns what it saw.

    Strict, but for the classifier's rows: it may grow, and since clean landmarks come first the
    learned rows keep their places.
    """
    about = nets.describe(folder)
    if not (folder / "stage.json").exists():
        raise FileNotFoundError(
            f"{folder}: the stage is not finished; run it to its end first"
        )
    nets.load_weights(network, folder)
    source = folder / "head.safetensors"
    load_strictly(head, grown(load_file(source), head.state_dict(), source), source)
    return about["seen"]


def grown(
    old: Mapping[str, Tensor], own: Mapping[str, Tensor], source: object
) -> dict[str, Tensor]:
    """The old classifier's rows on top of our own; refuses to shrink."""
    weights = dict(old)
    rows, mine = old["weight"], own["weight"].detach().clone()
    if len(rows) > len(mine):
        raise ValueError(f"{source}: {len(rows)} classes do not fit in {len(mine)}")
    if rows.shape[1:] == mine.shape[1:]:
        mine[: len(rows)] = rows
        weights["weight"] = mine
    return weights


def write_log(folder: Path, rows: Sequence[Sequence[float]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(LOG)
    table.writerows(rows)
    files.write_text(folder / "log.csv", text.getvalue())


def read_log(folder: Path) -> dict[str, list[float]]:
    """Columns of LOG."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in LOG}
