"""What a killed run, a full disk and bad input leave behind: nothing lost, nothing half-written."""

import math
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from kit import files
from kit.answers import gain_table
from kit.data import toy

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "scripts" / "run_pipeline.py")]
TINY = [
    *("--workers", "1", "--save-every", "2"),
    *("--set", "clean.size=48", "--set", "clean.epochs=1", "--set", "clean.batch=8"),
    *("--set", "c2x.size=64", "--set", "c2x.epochs=1", "--set", "c2x.batch=8"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "data"
    return toy.render(folder, toy.ToyConfig(landmarks=8, images=80, side=64))


def command(data: Path, work: Path, *more: str) -> list[str]:
    return [*RUN, "--data", str(data), "--work", str(work), *TINY, *more]


def run(*given: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*given), capture_output=True, text=True, check=False, **more
    )


def results(work: Path) -> dict[str, str]:
    names = ["submission.csv", "chain.json", "gains.csv"]
    names += [f"runs/toy/{stage}/model.safetensors" for stage in ("clean", "c2x")]
    names += [f"features/toy/c2x/{name}/vectors.npy" for name in ("query", "index")]
    names = [f"answers/toy/{n}" if "/" not in n else n for n in names]
    return {name: files.sha256(work / name) for name in names}


def ours(marker: str) -> list[int]:
    """Processes that mention this run's work folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "cmdline").read_text() + os.readlink(folder / "cwd"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_pipeline_killed_anywhere_ends_with_the_same_bits(data, tmp_path):
    seed = int(os.environ.get("KIT_TEST_SEED", time.time_ns() % 2**32))
    print(f"KIT_TEST_SEED={seed}")
    rng = random.Random(seed)
    done = run(data, tmp_path / "whole")
    assert done.stdout.splitlines()[-2].startswith("private mAP@100 0.")
    killed = command(data, tmp_path / "killed")
    for _ in range(6):
        process = subprocess.Popen(
            killed, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            process.wait(rng.uniform(5, 25))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    done = run(data, tmp_path / "killed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    time.sleep(5)
    assert not ours(str(tmp_path))


def test_the_list_shows_every_step_and_runs_none(data, tmp_path):
    done = run(data, tmp_path / "work", "--list")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[:3] == ["step", "00_image_lists", "02_train_clean"]
    assert names[-1] == "05_submission"
    assert done.returncode == 0 and not (tmp_path / "work" / "lists").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "toi"], "recipe 'toi' is not one of toy"),
        (
            ["--from", "06_publish"],
            "no step '06_publish'; the steps are 00_image_lists",
        ),
        (["--force", "clean"], "no step 'clean'"),
        (
            ["--set", "cleen.epochs=1"],
            "recipe toy has no stage 'cleen'; stages: clean, c2x",
        ),
        (["--set", "clean.epochs=one"], "write STAGE.FIELD=VALUE"),
        (["--machine", "compile=yes"], "write FIELD=VALUE, VALUE as in JSON"),
        (["--machine", "lr=1"], "machine: 'lr' is not one of accumulate,"),
        (["--set", "clean.epoch=1"], "no field 'epoch' (close: epochs); fields:"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_starts_nothing(
    data, tmp_path, more, message
):
    done = run(data, tmp_path / "work", *more)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "work" / "lists").exists()


@pytest.mark.parametrize(
    "more",
    [
        *(["--data", "none"], ["--weights", "none"], ["--table", "none"]),
        *(["--clean", "none"], ["--exclusions", "none"], ["--index-ids", "none"]),
        *(["--from", "none"], ["--force", "none"]),
        *(["--stop-after", "none"], ["--stop-after", "0"], ["--stop-after=-5m"]),
    ],
    ids=" ".join,
)
def test_an_option_that_names_nothing_is_refused_even_by_a_list(data, tmp_path, more):
    done = run(data, tmp_path / "work", *more, "--list")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and more[-1].split("=")[-1] in line
    assert not (tmp_path / "work").exists()


def test_a_work_folder_that_cannot_be_written_is_refused_by_name(data, tmp_path):
    (tmp_path / "file").touch()
    for work in (tmp_path / "file", tmp_path / "file" / "work", Path("/proc/work")):
        done = run(data, work)
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 1
        assert line.startswith(f"run_pipeline: --work {work}: no file can be made")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: (d / "train/train_clean.csv").unlink(),
            "train_clean.csv: no such file",
        ),
        (lambda d: (d / "index/index.csv").write_text("name\nx\n"), "no column id"),
        (lambda d: (d / "test/test.csv").write_text("id\n"), "test.csv: no rows"),
        (lambda d: (d / "train").rename(d / "training"), "no list clean"),
        (lambda d: (d / "index").rename(d / "indices"), "no list"),
    ],
)
@pytest.mark.slow
def test_bad_data_stops_the_step_with_one_clear_line(data, tmp_path, break_it, message):
    subprocess.run(["cp", "-r", data, tmp_path / "data"], check=True)
    break_it(tmp_path / "data")
    done = run(tmp_path / "data", tmp_path / "work")
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "work").rglob("*.part"))
    assert not list((tmp_path / "work").rglob("submission.csv"))


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(data, tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = run(data, tmp_path / "work", preexec_fn=small_files)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "not written: File too large" in last and str(tmp_path / "work") in last
    assert not list((tmp_path / "work").rglob("*.part"))
    assert not list((tmp_path / "work").rglob("stage.json"))
    again = run(data, tmp_path / "work")
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
def test_a_folder_of_classes_held_out_from_training_must_reach_report_and_recognition(
    tmp_path,
):
    """Six classes of four pictures: every query is of a class that no model has met."""
    random = np.random.default_rng(0)
    for name in "abcdef":
        scene = cv2.resize(random.integers(0, 255, (6, 8, 3), np.uint8), (160, 120))
        for number in range(4):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.roll(scene, 5 * number, axis=1))
    more = ["--layout", "folders", "--pretrained", "", "--workers", "0", "--recognise"]
    done = run(tmp_path / "data", tmp_path / "work", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = tmp_path / "work" / "answers" / "toy"
    assert (answers / "report.html").exists() and (answers / "landmarks.csv").exists()
    gains = {
        name: halves for name, *halves, _ in gain_table.read(answers / "gains.csv")
    }
    assert all(0 <= half <= 1 for halves in gains.values() for half in halves)
    # the landmarks of held-out classes are in no training list: no answer can be right
    named = gain_table.read(answers / "recognition_gains.csv")
    assert all(math.isnan(half) for _, *halves, _ in named for half in halves)
    assert "nan" not in done.stdout
