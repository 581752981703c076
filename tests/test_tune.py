import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kit import checksums, config, launch, pipeline, tune
from kit.answers import leaks
from kit.answers.trial import Search, Trial, score
from kit.data import lists, sources
from kit.data.inputs import InputSpec
from kit.features import extract, store
from kit.models.net import NetConfig
from kit.training import stage
from kit.training.job import Job, Stage, change
from kit.training.optim import Optim

ROOT = Path(__file__).resolve().parents[1]
PLAN = Stage(
    "first", images="clean", size=32, epochs=1, batch=12, optim=Optim(clip=1.0)
)
NET = NetConfig("test_efficientnet", dim=16, input=InputSpec(32))
SPACE = {"lr": [1e-2, 1e12, 1e-1], "margin": [0.2]}  # the second one ends in NaN
SEEDS = (0, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What this process and the trials' compute, in the same order of additions."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine classes of blurred colours under much noise, three of them held out, and lists."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for label in range(9):
        colours = rng.integers(60, 196, (4, 5, 3))
        (root / f"class{label}").mkdir()
        for number in range(8):
            noisy = (colours + rng.normal(0, 70, (4, 5, 3))).clip(0, 255)
            image = cv2.resize(noisy.astype(np.uint8), (48, 40))
            cv2.imwrite(str(root / f"class{label}" / f"{number}.jpg"), image)
    lists.build(sources.from_folders(root), root, root / "lists")
    return root


def search_in(folder: Path, data: Path, **fields) -> Search:
    job = Job(
        PLAN,
        NET,
        lists=data / "lists",
        data=data,
        runs=folder / "runs",
        workers=0,
        save_every=2,
        log_every=1,
    )
    return Search(job, folder / "tune", seeds=SEEDS, **fields)


@pytest.fixture
def search(tmp_path, data) -> Search:
    return search_in(tmp_path, data)


@pytest.fixture(scope="module")
def done(tmp_path_factory, data) -> Search:
    """A grid of three points, run in two blocks."""
    search = search_in(tmp_path_factory.mktemp("done"), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        for block in ("0/2", "1/2"):
            tune.tune(SPACE, search, gpus=2, block=block)
            if block == "0/2":
                assert [float(row["lr"]) for row in rows(search)] == [1e-2, 1e-1]
    return search


def rows(search: Search) -> list[dict[str, str]]:
    with (search.folder / "tune.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_hand(search: Search, runs: Path, seed: int, **fields) -> tuple[float, float]:
    """Public and private mAP@100 by a run without any of kit.tune and kit.answers."""
    job = replace(search.job, stage=change(PLAN, seed=seed, **fields), runs=runs)
    model = stage.run(job)
    vectors, ids = [], []
    for name in ("query", "index"):
        where = job.lists, name, job.data, runs / str(seed)
        looks = extract.Job(model.parent, (model.name,), *where, workers=0)
        features = store.load(*extract.run(looks))
        vectors.append(np.array(features.vectors, np.float64))
        ids.append(list(features.ids))
    precisions: dict[str, list[float]] = {"Public": [], "Private": []}
    with (job.lists / "solution.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = set(row["images"].split())
            cosines = vectors[1] @ vectors[0][ids[0].index(row["id"])]
            hits, total = 0, 0.0
            for place, at in enumerate(np.argsort(-cosines, kind="stable")[:100], 1):
                if ids[1][at] in wanted:
                    hits += 1
                    total += hits / place
            precisions[row["Usage"]].append(total / min(len(wanted), 100))
    return tuple(float(np.mean(precisions[half])) for half in ("Public", "Private"))


def test_two_blocks_cover_every_point_once(done):
    found = rows(done)
    assert sorted(float(row["lr"]) for row in found) == sorted(SPACE["lr"])
    assert [row["trial"] for row in found] == ["0", "1", "2"]
    assert {row["margin"] for row in found} == {"0.2"}
    assert {row["seeds"] for row in found} == {"0 3"}


def test_a_row_has_mean_and_spread_of_what_hand_runs_score(done, tmp_path):
    row = next(row for row in rows(done) if float(row["lr"]) == 1e-1)
    got = [by_hand(done, tmp_path, seed, lr=1e-1, margin=0.2) for seed in SEEDS]
    for name, (a, b) in zip(("public", "private"), zip(*got, strict=True), strict=True):
        assert a != b
        assert float(row[name]) == pytest.approx((a + b) / 2, abs=2e-6)
        spread = abs(a - b) / 2**0.5  # standard deviation of two
        assert float(row[f"{name}_spread"]) == pytest.approx(spread, abs=2e-6)
    assert float(row["seconds"]) > 0 and row["error"] == ""


def test_a_failed_trial_is_a_row_with_its_reason_and_the_others_go_on(done):
    states = {float(row["lr"]): row for row in rows(done)}
    assert {lr: row["state"] for lr, row in states.items()} == {
        1e-2: "done",
        1e12: "failed",
        1e-1: "done",
    }
    failed = states[1e12]
    assert "FloatingPointError: stage first: the loss is" in failed["error"]
    assert "\n" not in failed["error"]
    assert failed["public"] == failed["private"] == ""


def test_the_objective_of_the_study_is_the_public_half(done):
    study, _ = tune._study(done.folder)
    scored = [row for row in rows(done) if row["public"]]
    best = max(scored, key=lambda row: float(row["public"]))
    assert study.best_value == pytest.approx(float(best["public"]), abs=1e-6)
    assert study.best_params == {"lr": float(best["lr"]), "margin": 0.2}


def test_a_second_run_runs_nothing_and_leaves_the_same_table(done):
    before = (done.folder / "tune.csv").read_bytes()
    logs = {
        path: path.stat().st_mtime_ns
        for path in done.folder.rglob("trials/*/trial.log")
    }
    assert len(logs) == 3
    tune.tune(SPACE, done, gpus=1)
    assert (done.folder / "tune.csv").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_the_table_has_the_best_public_score_first_and_failures_last(done):
    header, found = tune.table(done.folder)
    state, public = header.index("state"), header.index("public")
    assert [row[state] for row in found] == ["done", "done", "failed"]
    assert found[0][public] > found[1][public] and found[2][public] is None
    assert header[:4] == ["trial", "state", "lr", "margin"]


def test_only_the_best_trials_weights_and_features_are_left(done):
    header, found = tune.table(done.folder)
    best = found[0][header.index("trial")]
    kept = {
        path.relative_to(done.folder / "trials").as_posix()
        for path in done.folder.rglob("*.safetensors")
    }
    assert kept == {
        f"{best}/{seed}/first/{name}.safetensors"
        for seed in SEEDS
        for name in ("model", "head")
    }
    left = {path.parts[-3] for path in done.folder.glob("trials/*/*/features")}
    assert left == {str(best)}
    assert len(list(done.folder.glob("trials/*/0/first/stage.json"))) == 2
    weights = done.folder / "trials" / str(best) / "3" / "first" / "model.safetensors"
    assert load_file(weights)


def test_a_folder_of_another_search_is_refused_by_what_differs(done):
    before = (done.folder / "tune.csv").read_bytes()
    for other, what in (
        (replace(done, seeds=(0,)), "seeds"),
        (replace(done, job=replace(done.job, stage=change(PLAN, crop=0.9))), "stage"),
        (replace(done, job=replace(done.job, net=replace(NET, dim=8))), "network"),
        (replace(done, index="index_train_holdout"), "searched, lists"),
    ):
        with pytest.raises((ValueError, leaks.LeakError), match=what):
            tune.tune(SPACE, replace(other, optimistic=True), gpus=1)
    assert (done.folder / "tune.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 2, "per_trial": 3}, r"per_trial is 3, not one of 1 to 2 \(gpus\)"),
        ({"gpus": 2, "per_trial": 0}, "per_trial is 0, not one of 1 to 2"),
        ({"gpus": 1, "block": "2/2"}, "block '2/2' is not i/n with i from 0 to n - 1"),
        ({"gpus": 1, "block": "-1/2"}, "block '-1/2' is not i/n"),
        ({"gpus": 1, "block": "1"}, "block '1' is not i/n"),
    ],
)
def test_what_cannot_be_placed_is_refused(search, options, words):
    with pytest.raises(ValueError, match=words):
        tune.tune(SPACE, search, **options)
    assert not search.folder.exists()


def test_what_cannot_be_searched_or_scored_is_refused_before_the_first_trial(
    search, data, tmp_path
):
    with pytest.raises(ValueError, match="no field 'rate'.* fields: .*lr"):
        tune.tune({"rate": [1]}, search, gpus=1)
    with pytest.raises(ValueError, match="a space is empty"):
        tune.tune([{}], search, gpus=1)
    with pytest.raises(FileNotFoundError, match="no list c3x"):
        tune.tune({"images": ["clean", "c3x"]}, search, gpus=1)
    with pytest.raises(FileNotFoundError, match="no model in .*zero"):
        tune.tune({"init": ["zero"]}, search, gpus=1)
    with pytest.raises(ValueError, match="stage first cannot start from itself"):
        tune.tune({"init": ["", "first"]}, search, gpus=1)
    with pytest.raises(leaks.LeakError, match="list all holds 6 validation queries"):
        tune.tune({"images": ["all"]}, leaky(search, data, tmp_path), gpus=1)
    with pytest.raises(ValueError, match="solution.csv: no query of the Public half"):
        tune.tune(SPACE, leaky(search, data, tmp_path, "Private"), gpus=1)
    with pytest.raises(FileNotFoundError, match="no search in .*; run 08_tune"):
        tune.table(search.folder)
    assert not search.folder.exists()


def leaky(search: Search, data: Path, folder: Path, usage: str = "") -> Search:
    """The same lists, `all` with the queries in it, all of them in one half if asked."""
    copy = folder / f"lists{usage}"
    copy.mkdir()
    for path in (data / "lists").iterdir():
        text = path.read_text()
        if path.name == "all.csv":
            queries = (data / "lists" / "query.csv").read_text().splitlines()[1:]
            text += "".join(f"{line}\n" for line in queries)
        if path.name == "solution.csv" and usage:
            text = text.replace("Public", usage)
        (copy / path.name).write_text(text)
    about = json.loads((copy / "all.json").read_text())
    lists.describe_file(copy / "all.csv", about)
    about = json.loads((copy / "solution.json").read_text())
    about["checksums"] = checksums.compute_checksums(copy, ["solution.csv"])
    checksums.write_manifest(copy / "solution.json", about)
    return replace(search, job=replace(search.job, lists=copy))


def test_seeds_and_what_is_kept_are_checked(search):
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds .* are none, or one stands twice"):
            replace(search, seeds=seeds)
    with pytest.raises(ValueError, match="keep 'some' is not one of best, all, none"):
        replace(search, keep="some")


def test_a_trial_survives_its_file(search):
    trial = Trial(search, change(PLAN, milestones=[1, 2]), 3, 2)
    path = config.write(trial, search.folder / "trial.json")
    assert config.read(Trial, path) == trial


def test_gpus_are_split_into_groups_of_those_that_are_shown(monkeypatch):
    assert tune._places(4, 2) == ["", ""]  # no GPU here: two trials at once on the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert tune._places(5, 2) == ["0,1", "2,3"]
    assert tune._places(4, 1) == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,2")
    assert tune._places(5, 2) == ["7,6", "5,4"]
    with pytest.raises(ValueError, match="gpus is 6, there are 5 CUDA devices"):
        tune._places(6, 1)


def test_a_stage_with_a_stage_before_it_starts_from_there_and_leaves_it_whole(
    search, tmp_path
):
    """Removal of a trial's weights does not follow the link to the earlier stage."""
    earlier = replace(search.job, stage=replace(PLAN, name="zero"))
    weights = stage.run(earlier) / "model.safetensors"
    before = weights.read_bytes()
    plan = replace(PLAN, init="zero")
    search = replace(search, seeds=(4,), job=replace(search.job, stage=plan))
    for number in range(2):
        got = score(Trial(search, change(plan, lr=1e-3), number, 1), 4)
    hand = replace(search, job=replace(search.job, stage=plan))
    job = replace(hand.job, stage=change(plan, lr=1e-3, seed=4))
    own = search.folder / "trials" / "1" / "4" / "first" / "model.safetensors"
    assert (stage.run(job) / "model.safetensors").read_bytes() == own.read_bytes()
    assert all(0 < half <= 1 for half in got[:2])
    assert str(got[2]).startswith("ground truth solution.csv ")
    study, _ = tune._study(search.folder)
    for point in tune.points({"lr": [1e-3, 2e-3]}, plan):
        tune._add(study, point)
    for number, public in enumerate((0.7, 0.6)):
        study.tell(number, public)
    tune._clean(search, study.trials)
    assert not own.exists() and weights.read_bytes() == before
    assert (search.folder / "trials/0/4/first/model.safetensors").exists()
    tune._clean(replace(search, keep="none"), study.trials)
    assert not list(search.folder.glob("trials/*/4/first/*.safetensors"))
    assert weights.read_bytes() == before


def test_when_the_time_is_over_no_trial_is_started(search, monkeypatch):
    monkeypatch.setenv(launch.STOP_AT, "1")
    with pytest.raises(launch.Stopped, match="the time is over; tune again to go on"):
        tune.tune(SPACE, search, gpus=1)
    assert not (search.folder / "trials").exists()


# --- searches that are killed, stopped, or run by several ---------------------------------------

LAUNCHER = """
import sys, torch
from pathlib import Path
from kit import config, tune
from kit.answers.trial import Search
if __name__ == "__main__":
    devices, gpus, per_trial = map(int, sys.argv[3:])
    torch.cuda.device_count = lambda: devices
    search = config.read(Search, Path(sys.argv[1]))
    tune.tune(eval(sys.argv[2]), search, gpus=gpus, per_trial=per_trial)
"""


def launched(
    search: Search, space: dict, devices: int = 0, gpus: int = 1, per_trial: int = 1
) -> subprocess.Popen:
    path = config.write(search, search.folder.parent / "search.json")
    environment = dict(os.environ)
    if devices:
        del environment["CUDA_VISIBLE_DEVICES"]
    arguments = [str(path), repr(space), *map(str, (devices, gpus, per_trial))]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


class Place(NamedTuple):
    """Where a process of a trial works."""

    trial: str
    devices: str  # its CUDA_VISIBLE_DEVICES


def trial_processes(search: Search) -> dict[int, Place]:
    """The living processes of trials by id; one may be there twice while it starts another."""
    trials = bytes(search.folder / "trials")
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        named = [word for word in words if word.startswith(trials + b"/")]
        shown = [v for v in environment if v.startswith(b"CUDA_VISIBLE_DEVICES=")]
        if named and shown:
            trial = named[0].removeprefix(trials + b"/").split(b"/")[0].decode()
            devices = shown[0].decode().partition("=")[2]
            found[int(path.parent.name)] = Place(trial, devices)
    return found


def wait_for(condition) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trial_that_was_interrupted(search, tmp_path):
    space = {"epochs": [1, 40, 2], "lr": [1e-2]}
    process = launched(search, space)
    trials = search.folder / "trials"
    wait_for((trials / "1/0/first/resume/state.pt").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not trial_processes(search))
    assert [row["trial"] for row in rows(search)] == ["0"]
    first = (trials / "0/trial.log").stat().st_mtime_ns
    tune.tune(space, search, gpus=1)
    assert "goes on from step" in (trials / "1/trial.log").read_text()
    assert (trials / "0/trial.log").stat().st_mtime_ns == first
    found = rows(search)
    assert [row["epochs"] for row in found] == ["1", "40", "2"]
    assert {row["state"] for row in found} == {"done"}
    assert sorted(path.name for path in trials.iterdir()) == ["0", "1", "2"]
    got = [by_hand(search, tmp_path, seed, lr=1e-2, epochs=40) for seed in SEEDS]
    public = sum(a for a, _ in got) / 2
    assert float(found[1]["public"]) == pytest.approx(public, abs=2e-6)


@pytest.mark.slow
def test_a_trial_on_two_gpus_has_two_ranks_which_end_with_a_killed_search(search):
    search = replace(search, seeds=(0,))
    process = launched(search, {"epochs": [30]}, gpus=2, per_trial=2)
    folder = search.folder / "trials/0/0/first"
    wait_for((folder / "resume/state.pt").exists)
    assert len(trial_processes(search)) >= 4  # the trial's, torchrun's, two ranks'
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not trial_processes(search))
    tune.tune({"epochs": [30]}, search, gpus=2, per_trial=2)
    assert json.loads((folder / "stage.json").read_text())["processes"] == 2
    assert [(row["trial"], row["state"]) for row in rows(search)] == [("0", "done")]
    log = (search.folder / "trials/0/trial.log").read_text()
    assert "goes on from step" in log


@pytest.mark.slow
def test_an_interrupt_ends_the_trials_and_leaves_them_unfinished(search):
    space = {"epochs": [300], "lr": [1e-2, 1e-3]}
    process = launched(search, space, gpus=2)
    wait_for(lambda: len(trial_processes(search)) >= 2)
    state = search.folder / "trials/1/0/first/resume/state.pt"
    wait_for(state.exists)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert not trial_processes(search)
    assert not (search.folder / "tune.csv").exists()
    study, _ = tune._study(search.folder)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "RUNNING"]


@pytest.mark.slow
def test_processes_without_blocks_share_a_search_on_groups_of_gpus(search):
    """Each point is run once; a group's trials see its devices alone."""
    space = {"lr": [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]}
    search = replace(search, keep="all")
    both = [launched(search, space, devices=2, gpus=2) for _ in range(2)]
    shown: dict[str, set[str]] = defaultdict(set)
    while any(process.poll() is None for process in both):
        for place in trial_processes(search).values():
            shown[place.trial].add(place.devices)
        time.sleep(0.05)
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(shown) == ["0", "1", "2", "3", "4"]
    assert all(len(devices) == 1 for devices in shown.values())
    assert set.union(*shown.values()) == {"0", "1"}
    found = rows(search)
    assert [row["state"] for row in found] == ["done"] * 5
    assert sorted(float(row["lr"]) for row in found) == sorted(space["lr"])
    assert len(list(search.folder.rglob("*/first/model.safetensors"))) == 10


@pytest.mark.slow
def test_a_trial_whose_time_is_over_is_no_row_and_goes_on(search, monkeypatch):
    space, log = {"epochs": [3]}, search.folder / "trials/0/trial.log"
    monkeypatch.setenv(launch.STOP_AT, "1")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "time_left", lambda: 1.0)  # it is over in the trial only
        with pytest.raises(launch.Stopped, match="the time is over"):
            tune.tune(space, search, gpus=1)
    assert not (search.folder / "tune.csv").exists()
    assert "stopped at step 1 of 12" in log.read_text()
    monkeypatch.delenv(launch.STOP_AT)
    tune.tune(space, search, gpus=1)
    assert "goes on from step 1" in log.read_text()
    assert [(row["trial"], row["state"]) for row in rows(search)] == [("0", "done")]


@pytest.mark.slow
def test_a_failed_point_is_run_again_when_asked_and_both_rows_stay(search):
    space, search = {"lr": [1e-2]}, replace(search, seeds=(0,))
    folder = search.job.data / "class0"
    away = folder.rename(search.job.data / "away")
    try:
        tune.tune(space, search, gpus=1)
    finally:
        away.rename(folder)
    (row,) = rows(search)
    assert row["state"] == "failed" and "48 images cannot be read" in row["error"]
    tune.tune(space, search, gpus=1)
    assert rows(search) == [row]
    for _ in range(2):  # the second time nothing is left to run
        tune.tune(space, search, gpus=1, retry=True)
        assert rows(search)[0] == row and len(rows(search)) == 2
    assert rows(search)[1]["state"] == "done"
    assert rows(search)[1]["public_spread"] == ""  # of a single seed


@pytest.mark.slow
def test_the_notebook_runs_a_search_and_shows_its_table(data, tmp_path):
    parameters = {
        "spaces": [{"lr": [1e-4, 1e-2, "log"], "milestones": [[1], [2, 3]]}],
        "overrides": {"size": 32, "eval_size": 32, "epochs": 1},
        "trials": 2,
        "lists_folder": str(data / "lists"),
        "data": str(data),
        "runs": str(tmp_path / "runs"),
        "folder": str(tmp_path / "tune"),
        "pretrained": "",
        "seeds": [0],
        "workers": 0,
        "num_gpus": 2,
    }
    notebook = ROOT / "notebooks" / "08_tune_training.ipynb"
    pipeline.run([pipeline.Step("tune", notebook, parameters)], tmp_path / "steps")
    header, found = tune.table(tmp_path / "tune")
    assert [row[header.index("state")] for row in found] == ["done", "done"]
    assert all(1e-4 <= row[header.index("lr")] <= 1e-2 for row in found)
    assert {row[header.index("milestones")] for row in found} <= {"[1]", "[2, 3]"}
    shown = (tmp_path / "steps" / "tune.ipynb").read_text()
    assert "<table>" in shown and f"{found[0][header.index('public')]:.4f}" in shown
