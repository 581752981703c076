"""What a stage leaves behind: weights, classifier, stage.json, log.csv, and how to go on.

runs/<recipe>/<stage>/model.safetensors, model.json   the network (kit.models.net)
                      head.safetensors                the classifier, for the next stage
                      stage.json                      what made them; written last
                      log.csv, tensorboard/           loss, learning rate, speed by step
                      resume/state.pt                 while the stage is unfinished
"""

import csv
import io
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

import kit
from kit import checksums, files
from kit.losses.heads import Classifier
from kit.models import net as nets
from kit.models.weights import write_weights

# what readers of zip archives and of pickles raise on damaged ones
BROKEN = (
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    UnpicklingError,
    NotImplementedError,
)
RESULT = (
    "model.safetensors",
    "model.json",
    "head.safetensors",
)  # what a stage hands over


class LogRow(NamedTuple):
    """A line of log.csv: means and rates since the line before."""

    step: int
    epoch: float  # of the schedule
    loss: float
    lr: float
    images_per_second: float
    waiting: float  # share of the time spent waiting for images
    gpu_gb: float  # most memory in use on the first process's GPU; 0 on CPU


def prepare(folder: Path, config: str) -> bool:
    """Whether `folder` holds the whole result of the stage with this fingerprint.

    If not, what another configuration left there is removed. For one process at a time.
    """
    about = checksums.find_manifest(folder / "stage.json", ("fingerprint",))
    whole = about and not checksums.find_damaged(folder, about | {"complete": True})
    if whole and about["fingerprint"] == config:
        return True
    if load_state(folder, config) is None:
        clear(folder)
    return False


def save_state(folder: Path, config: str, state: Mapping[str, Any]) -> None:
    """Everything needed to go on: weights, optimisers, scaler, step, log; replaces the last one."""
    path = folder / "resume" / "state.pt"
    with files.replacing(path, _count_bytes(state)) as temporary:
        torch.save({"fingerprint": config, **state}, temporary)


def load_state(folder: Path, config: str) -> dict[str, Any] | None:
    """The last saved state of the stage with this fingerprint, or None."""
    path = folder / "resume" / "state.pt"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # whose checksums torch does not look at
            damaged = archive.testzip()
        if damaged:
            raise EOFError(f"damaged at {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state if state["fingerprint"] == config else None
    except (*BROKEN, KeyError, TypeError, ValueError, IndexError) as error:
        raise checksums.Damaged(
            f"{path}: no state that can be gone on with ({str(error).splitlines()[0]}); begin "
            f"the stage again: --force 02_train_{folder.name}, or remove {path.parent}"
        ) from None


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
    for name in ("resume", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def gathered(state: dict[str, Any], head: Classifier) -> dict[str, Any]:
    """The state of the classifier's optimiser with all rows, on rank 0; every rank takes part."""
    return _by_rows(state, head.gather)


def split(state: dict[str, Any], head: Classifier) -> dict[str, Any]:
    """This rank's rows of what `gathered` made, at whatever number of ranks."""
    return _by_rows(state, head.rows)


def _count_bytes(state: Any) -> int:
    """Of the tensors in a state of dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        state = list(state.values())
    return sum(map(_count_bytes, state)) if isinstance(state, list | tuple) else 0


def _by_rows(
    state: dict[str, Any], of: Callable[[Tensor], Tensor | None]
) -> dict[str, Any]:
    moments = {
        index: {
            name: of(value) if isinstance(value, Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def save_result(
    folder: Path,
    network: nets.EmbeddingNet,
    head: Mapping[str, Tensor],
    about: Mapping[str, Any],
    seen: dict[str, str],
) -> Path:
    """Writes the stage's result, stage.json last, and removes the resume state."""
    nets.save(network, folder, seen)
    write_weights(folder / "head.safetensors", head)
    made = {"kit": kit.__version__}
    made["checksums"] = checksums.compute_checksums(folder, RESULT)
    checksums.write_manifest(folder / "stage.json", {**about, **made})
    shutil.rmtree(folder / "resume", ignore_errors=True)
    return folder


def hand_over(
    folder: Path, network: nets.EmbeddingNet, head: Classifier | None
) -> dict[str, str]:
    """Loads the stage saved in `folder` into a network and a classifier; returns what it saw.

    Strict, but for the classifier's rows: it may grow, and since clean landmarks come first the
    learned rows keep their places. Without a classifier, its own stays as it is.
    """
    about = nets.describe(folder)
    stage = folder / "stage.json"
    if not stage.exists():
        raise FileNotFoundError(
            f"{folder}: the stage is not finished; run it to its end first"
        )
    made = checksums.read_manifest(stage, nets.REPAIR)
    checksums.verify_files(folder, made, nets.REPAIR, RESULT)
    nets.load_weights(network, folder)
    if head is not None:
        source = folder / "head.safetensors"
        head.load_full(load_file(source), source)
    return about["seen"]


def write_log(folder: Path, rows: Sequence[LogRow]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(LogRow._fields)
    table.writerows(rows)
    files.write_text(folder / "log.csv", text.getvalue())


def read_log(folder: Path) -> dict[str, list[float]]:
    """Columns of LogRow."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in LogRow._fields}


class Scalars:
    """The log's columns for TensorBoard; what a killed run wrote after `step` is dropped."""

    def __init__(self, folder: Path, step: int, on: bool) -> None:
        self.folder, self.step, self.on = folder / "tensorboard", step, on

    def __enter__(self) -> Self:
        if self.on:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
        return self

    def add(self, row: LogRow) -> None:
        for name, value in row._asdict().items():
            if name != "step":
                self.writer.add_scalar(name, value, row.step)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.on:
            self.writer.close()
