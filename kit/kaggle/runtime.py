"""Where Kaggle mounts things, which run this is, which GPUs work, and how much time is left."""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

ROOT = "KIT_KAGGLE_ROOT"  # the folder that stands for /kaggle
RUN_TYPE, RERUN = "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_IS_COMPETITION_RERUN"
VISIBLE = "CUDA_VISIBLE_DEVICES"
PUBLIC_QUERIES = 1_129  # of landmark-retrieval-2021 outside the hidden rerun

FORMS = {  # kind: how kernel-metadata.json writes it, how many parts that has
    "dataset": ("owner/slug or owner/slug/version", (2, 3)),
    "competition": ("slug", (1,)),
    "notebook": ("owner/slug or owner/slug/version", (2, 3)),
    "model": ("owner/model/framework/variation/version", (5,)),
}
DEPTHS = {"datasets": 2, "competitions": 1, "notebooks": 2, "models": 5}


# --- folders ------------------------------------------------------------------------------------


def root() -> Path:
    return Path(os.environ.get(ROOT) or "/kaggle")


def working() -> Path:
    """What is written here is kept as the notebook's output (20 GB)."""
    return _made(root() / "working")


def temp() -> Path:
    """Scratch that a run loses; the system's own where /kaggle/temp cannot be made."""
    try:
        return _made(root() / "temp")
    except OSError:
        return _made(Path(tempfile.gettempdir()) / "kaggle")


def find(kind: str, name: str) -> Path:
    """The folder where a source is mounted.

    kind: of FORMS; name: as kernel-metadata.json has it. Kaggle mounts a source at
    input/<slug>, or at input/<kind>s/<owner>/<slug>, some of a run's one way and some the
    other. Where both are there the second one counts: only that path says whose it is, the
    short one may be another owner's or another kind's of the same slug. That is logged and
    never an error, for nothing is in doubt. An empty folder is none.
    """
    places = candidates(kind, name)
    there = [place for place in places if _filled(place)]
    if not there:
        empty = [place for place in places if place.is_dir()]
        what = f"{empty[0]} is mounted, but empty" if empty else "is not mounted"
        raise FileNotFoundError(f"{kind} {name}: {what}; mounted: {_said()}")
    if len(there) > 1 and not there[0].samefile(there[1]):
        log.warning("%s %s: taken from %s, not from %s", kind, name, *there[:2])
    return there[0]


def candidates(kind: str, name: str) -> list[Path]:
    """Where a source may be mounted, the place that counts first."""
    if kind not in FORMS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(FORMS)}")
    form, lengths = FORMS[kind]
    parts = name.split("/")
    if len(parts) not in lengths or not all(_plain(part) for part in parts):
        raise ValueError(f"{kind} {name!r} is not of the form {form}")
    if kind == "model":
        owner, model, framework, variation, version = parts
        own = (model, framework.lower(), variation, version)
        named = (owner, *own)
    elif kind == "competition":
        own = named = (parts[0],)
    else:  # a pinned version is in the metadata, not in the path
        own, named = (parts[1],), tuple(parts[:2])
    inputs = root() / "input"
    short = [] if own[0] in DEPTHS else [inputs.joinpath(*own)]
    return [inputs.joinpath(f"{kind}s", *named), *short]


def mounted() -> list[str]:
    """Every source there is, as a path below input/."""
    inputs = root() / "input"
    found = []
    for place in sorted(inputs.iterdir()) if inputs.is_dir() else []:
        pattern = "/".join("*" * DEPTHS.get(place.name, 0))
        found += sorted(place.glob(pattern)) if pattern else [place]
    return [place.relative_to(inputs).as_posix() for place in found]


def _said() -> str:
    return ", ".join(mounted()) or f"nothing in {root() / 'input'} ({ROOT} moves it)"


def _plain(part: str) -> bool:
    return bool(part) and part not in (".", "..") and "\0" not in part


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- the run ------------------------------------------------------------------------------------


class Mode(StrEnum):
    INTERACTIVE = "interactive"  # someone looks on: an editor's session, or no Kaggle
    COMMIT = "commit"  # the public queries in a batch: a rehearsal
    RERUN = "rerun"  # the hidden queries: what is scored


class Run(NamedTuple):
    mode: Mode
    agreed: bool  # what the environment says and what the queries say
    statement: str  # one line for the log


def mode_by_environment(environment: Mapping[str, str] = os.environ) -> Mode:
    if environment.get(RERUN):
        return Mode.RERUN
    kind = environment.get(RUN_TYPE) or "Interactive"
    return Mode.INTERACTIVE if kind.lower() == "interactive" else Mode.COMMIT


def hidden(
    queries: Collection[str], public: Collection[str] | int = PUBLIC_QUERIES
) -> bool:
    """Whether these queries are others than the public run's: its ids, or how many it has."""
    if isinstance(public, int):
        return len(set(queries)) != public
    return set(queries) != set(public)


def detect(
    queries: Collection[str],
    public: Collection[str] | int = PUBLIC_QUERIES,
    environment: Mapping[str, str] = os.environ,
) -> Run:
    """Which run this is, by the environment, with the queries as a second opinion.

    When they disagree a batch run is taken for the rerun: a commit that does all the work
    costs hours, a rerun that does a part of it costs the score. A session with someone in
    front of it stays one.
    """
    said, other = mode_by_environment(environment), hidden(queries, public)
    agreed = other == (said is Mode.RERUN)
    known = public if isinstance(public, int) else len(set(public))
    shown = f"the {len(set(queries)):,} queries are"
    shown += " not" * other + f" the {known:,} public ones"
    if agreed:
        return Run(said, True, f"{said}: so says the environment, and {shown}")
    mode = Mode.INTERACTIVE if said is Mode.INTERACTIVE else Mode.RERUN
    doubt = f"the environment says {said}, but {shown}; taken for {mode}"
    return Run(mode, False, f"{mode}: {doubt}")


def stop_at(started: float, hours: float, reserve: float = 0.0) -> float:
    """Unix time at which work must end: `reserve` seconds before the limit.

    started: unix time of the session's start. As the variable kit.launch.STOP_AT it makes
    ranks save and end in time.
    """
    if hours <= 0 or reserve < 0:
        raise ValueError(f"{hours} hours less {reserve} seconds are no time to work")
    return started + hours * 3600 - reserve


def time_left(
    started: float, hours: float, reserve: float = 0.0, now: float | None = None
) -> float:
    """Seconds until `stop_at`; negative when it has passed."""
    return stop_at(started, hours, reserve) - (time.time() if now is None else now)


# --- GPUs ---------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    number: int  # among the visible ones
    name: str
    memory: float  # GB
    fault: str = ""  # why it cannot be used, in one line


class Gpus(NamedTuple):
    found: tuple[Gpu, ...]
    trouble: str = ""  # why nobody knows what is there, in one line

    @property
    def working(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.found if not gpu.fault)

    def __str__(self) -> str:
        good = [f"{gpu.name} ({gpu.memory:.0f} GB)" for gpu in self.working]
        bad = [
            f"{gpu.name} is treated as none: {gpu.fault}"
            for gpu in self.found
            if gpu.fault
        ]
        count = f"{len(good)} GPU{'s' * (len(good) > 1)}: {', '.join(good)}"
        return "; ".join(
            [count if good else "no GPU", *bad, *filter(None, [self.trouble])]
        )


def gpus(patience: float = 300.0) -> Gpus:
    """Every GPU, tried by a real operation in a process of its own.

    A device that torch lists may have no kernels in this build of torch, and dies at its first
    operation. The process that asks stays without a CUDA context, which could no longer be
    hidden from it and would hold half a GB.
    """
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kit.kaggle.runtime"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Gpus((), f"the check took more than {patience:.0f} s")
    if done.returncode:
        said = _line(done.stderr.strip().rpartition("\n")[2])
        return Gpus((), f"the check ended with code {done.returncode}: {said}")
    lines = done.stdout.strip().splitlines()
    return Gpus(tuple(Gpu(*each) for each in json.loads(lines[-1])))


def hide_faulty(seen: Gpus) -> int:
    """Leaves this process and its children the GPUs that work; how many these are."""
    if seen.trouble or len(seen.working) < len(seen.found):
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            raise RuntimeError("CUDA is in use already; hide faulty GPUs before that")
        names = list(filter(None, os.environ.get(VISIBLE, "").split(",")))
        numbers = [gpu.number for gpu in seen.working]
        kept = [names[n] if names else str(n) for n in numbers]
        os.environ[VISIBLE] = ",".join(kept)
    return len(seen.working)


def fault(operation: Callable[[], None]) -> str:
    """What the operation fails with, in one line; "" where it works."""
    try:
        operation()
    except RuntimeError as error:  # torch's own errors of devices are of this type
        return _line(str(error)) or type(error).__name__
    return ""


def _line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def _try(number: int) -> None:
    """A half-precision convolution and product on a GPU, whose result is known."""
    import torch

    device = torch.device("cuda", number)
    ones = torch.ones(2, 8, 16, 16, device=device, dtype=torch.float16)
    kernel = torch.ones(8, 8, 3, 3, device=device, dtype=torch.float16)
    found = torch.nn.functional.conv2d(ones, kernel).flatten(1) / 72  # (2, 1568) ones
    product = (found @ found.T).tolist()
    if product != [[1568, 1568], [1568, 1568]]:
        raise RuntimeError(f"a product of ones comes out as {product}, not 1568")


def main() -> None:
    """Prints the GPUs as JSON."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        reason = fault(lambda number=number: _try(number))
        if "no kernel image" in reason:
            own = f"sm_{about.major}{about.minor}"
            reason += (
                f" (it is {own}; torch has {' '.join(torch.cuda.get_arch_list())})"
            )
        found.append(Gpu(number, about.name, about.total_memory / 1e9, reason))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
