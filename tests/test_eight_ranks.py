"""Eight processes train through the notebook; one is killed, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from kit import files
from kit.data import lists, sources, toy
from kit.training import checkpoints

ROOT = Path(__file__).resolve().parents[1]
RANKS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eight")
    data = toy.render(folder / "data", toy.ToyConfig(landmarks=20, images=200, side=64))
    lists.build(sources.official(data), data, folder / "lists")
    return data


def start(data: Path, runs: Path) -> subprocess.Popen:
    """The notebook, executed by papermill as the pipeline does."""
    given = {
        "recipe": "toy",
        "pretrained": "",
        "lists_folder": str(data.parent / "lists"),
        "data": str(data),
        "runs": str(runs),
        "num_gpus": RANKS,
        "workers": 0,
        "save_every": 2,
        "overrides": {"size": 32, "batch": 16, "epochs": 3},
    }
    runs.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "papermill", "--no-progress-bar"),
            *("-y", yaml.safe_dump(given)),
            *(str(ROOT / "notebooks/02_train_stage.ipynb"), str(runs / "out.ipynb")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks(runs: Path) -> dict[int, int]:
    """Rank -> process id of those that train in `runs`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(runs / "clean" / "job.json").encode() in words:
            numbers = [v[5:] for v in environment if v.startswith(b"RANK=")]
            found |= {int(number): int(folder.name) for number in numbers}
    return found


@pytest.mark.slow
def test_eight_processes_share_the_work_and_outlive_a_kill(data, tmp_path):
    whole = start(data, tmp_path / "whole")
    said, _ = whole.communicate(timeout=500)
    assert whole.returncode == 0, said[-3000:]
    about = files.read_json(tmp_path / "whole/clean/stage.json")
    assert about["processes"] == RANKS
    head = load_file(tmp_path / "whole/clean/head.safetensors")
    assert len(head["weight"]) == about["classes"] > RANKS  # two rows or one a rank

    runs = tmp_path / "killed"
    process = start(data, runs)
    state, give_up = runs / "clean/resume/state.pt", time.monotonic() + 300
    while not state.exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    os.kill(ranks(runs)[5], signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert process.returncode and "rank 5 was killed by SIGKILL" in said
    assert time.monotonic() - killed < 60
    assert not ranks(runs)
    assert not (runs / "clean/stage.json").exists()

    again = start(data, runs)
    said, _ = again.communicate(timeout=500)
    assert again.returncode == 0, said[-3000:]
    for name in ("model.safetensors", "head.safetensors"):
        first, second = (
            tmp_path / each / "clean" / name for each in ("whole", "killed")
        )
        assert first.read_bytes() == second.read_bytes()
    steps = checkpoints.read_log(runs / "clean")["step"]
    assert steps[-1] == about["steps"]
