import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from kit import launch
from kit.data import lists, sources
from kit.data.augment import Augment
from kit.data.inputs import InputSpec
from kit.models.net import NetConfig
from kit.training import checkpoints, stage
from kit.training.stage import Job, Stage, change, cosine

ROOT = Path(__file__).resolve().parents[2]
NET = NetConfig("test_efficientnet", dim=16, input=InputSpec(32))
FIRST = Stage(
    "first",
    images="clean",
    size=32,
    epochs=2,
    batch=4,
    lr=1e-2,
    augment=Augment(crop=0.5, jitter=0.2, erase=0.5),
)


def paint(folder: Path, classes: int, each: int, odd: int = 0) -> Path:
    """A folder per class of noisy flat colours; the first `odd` files are cut short."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        colour = rng.integers(40, 215, 3)
        for number in range(each):
            path = folder / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = (colour + rng.normal(0, 20, (40, 48, 3))).clip(0, 255)
            cv2.imwrite(str(path), image.astype(np.uint8))
            if odd:
                path.write_bytes(path.read_bytes()[:200])
                odd -= 1
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    data = paint(tmp_path_factory.mktemp("photos"), classes=3, each=6)
    lists.build(sources.from_folders(data, held_out=0), data, data / "lists")
    return data


@pytest.fixture
def job(photos, tmp_path) -> Job:
    return Job(
        FIRST,
        NET,
        lists=photos / "lists",
        data=photos,
        runs=tmp_path / "runs",
        workers=0,
        save_every=2,
        log_every=1,
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes() + (
        folder / "head.safetensors"
    ).read_bytes()


@pytest.fixture
def interrupt(monkeypatch):
    """Makes training stop with an error before the given step."""
    update = stage._Training._update

    def at(step: int) -> None:
        def stopping(self, *batch):
            if self.done == step:
                raise KeyboardInterrupt
            return update(self, *batch)

        monkeypatch.setattr(stage._Training, "_update", stopping)

    yield at
    monkeypatch.undo()


def slow_cosine(t: float, base: float, total: float, warmup: float) -> float:
    """The 2021 system's schedule at t epochs, section by section."""
    if t < warmup:
        return 0.01 * base + t * (base - 0.01 * base) / warmup
    if t >= total:
        return 0.002 * base
    return 0.002 * base + 0.5 * (base - 0.002 * base) * (
        1 + math.cos(math.pi * t / total)
    )


@pytest.mark.parametrize("warmup", [0.0, 1.0, 1.5])
def test_the_learning_rate_follows_the_published_cosine(warmup):
    plan = dataclasses.replace(FIRST, epochs=10, warmup=warmup, lr=0.08)
    for step in range(0, 81, 3):
        assert cosine(step, 8, plan) == pytest.approx(
            slow_cosine(step / 8, 0.08, 10, warmup), rel=1e-12
        )


def test_training_lowers_the_loss_and_leaves_a_whole_checkpoint(job):
    plan = change(FIRST, epochs=12, batch=9, crop=1.0, jitter=0.0, erase=0.0)
    folder = stage.run(dataclasses.replace(job, stage=plan))
    log = checkpoints.read_log(folder)
    assert np.mean(log["loss"][-4:]) < 0.6 * np.mean(log["loss"][:4])
    assert log["step"] == list(range(1, 12 * 2 + 1))  # 18 images
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {
        *("model.safetensors", "model.json", "head.safetensors"),
        *("stage.json", "log.csv"),
    }


def test_an_interrupted_stage_goes_on_to_the_same_bits(job, interrupt, tmp_path):
    whole = weights(stage.run(dataclasses.replace(job, runs=tmp_path / "whole")))
    for step in (
        1,
        3,
        7,
    ):  # before the first state, inside an epoch, in the second epoch
        interrupt(step)
        with pytest.raises(KeyboardInterrupt):
            stage.run(job)
        assert not (job.folder / "stage.json").exists()
    interrupt(-1)
    assert weights(stage.run(job)) == whole
    assert checkpoints.read_log(job.folder)["step"] == list(range(1, 11))


def test_the_number_of_loader_workers_does_not_matter(job, tmp_path):
    alone = weights(stage.run(job))
    helped = dataclasses.replace(job, workers=2, runs=tmp_path / "helped")
    assert weights(stage.run(helped)) == alone


def test_another_seed_gives_other_weights(job, tmp_path):
    other = dataclasses.replace(
        job, stage=change(FIRST, seed=1), runs=tmp_path / "other"
    )
    assert weights(stage.run(other)) != weights(stage.run(job))


def test_a_finished_stage_is_left_alone_and_a_changed_one_trained_again(job):
    stage.run(job)
    before = (job.folder / "model.safetensors").stat().st_mtime_ns
    stage.run(job)
    assert (job.folder / "model.safetensors").stat().st_mtime_ns == before
    stage.run(dataclasses.replace(job, stage=change(FIRST, lr=5e-3)))
    assert (job.folder / "model.safetensors").stat().st_mtime_ns != before


def test_a_stage_is_trained_again_when_the_one_before_it_changed(job):
    second = dataclasses.replace(
        job, stage=dataclasses.replace(FIRST, name="second", init="first", epochs=1)
    )
    stage.run(job)
    once = weights(stage.run(second))
    assert weights(stage.run(second)) == once
    stage.run(dataclasses.replace(job, stage=change(FIRST, seed=3)))
    assert weights(stage.run(second)) != once


def test_a_stage_remembers_every_list_of_its_chain(job):
    second = dataclasses.replace(
        FIRST, name="second", init="first", epochs=1, images="full"
    )
    stage.run(job)
    folder = stage.run(dataclasses.replace(job, stage=second))
    seen = json.loads((folder / "model.json").read_text())["seen"]
    hashes = {lists.load(job.lists, name).hash: name for name in ("clean", "full")}
    assert set(seen) == set(hashes)


def test_a_state_of_another_configuration_is_not_resumed(job, interrupt, tmp_path):
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        stage.run(job)
    interrupt(-1)
    changed = dataclasses.replace(job, stage=change(FIRST, margin=0.1))
    fresh = dataclasses.replace(changed, runs=tmp_path / "fresh")
    assert weights(stage.run(changed)) == weights(stage.run(fresh))


def test_rows_without_a_label_are_left_out(job, photos):
    table = pd.read_csv(photos / "lists" / "clean.csv", dtype=str)
    table.loc[0, "label"] = "-1"
    copy = job.runs.parent / "lists"
    copy.mkdir()
    table.to_csv(copy / "clean.csv", index=False, lineterminator="\n")
    about = json.loads((photos / "lists" / "clean.json").read_text())
    about["hash"] = lists.files.sha256(copy / "clean.csv")
    (copy / "clean.json").write_text(json.dumps(about))
    folder = stage.run(dataclasses.replace(job, lists=copy))
    assert json.loads((folder / "stage.json").read_text())["images"] == 17


def test_unreadable_images_are_recorded_and_training_goes_on(tmp_path, job):
    data = paint(tmp_path / "odd", classes=3, each=6, odd=2)
    lists.build(sources.from_folders(data, held_out=0), data, data / "lists")
    odd = dataclasses.replace(
        job,
        data=data,
        lists=data / "lists",
        stage=dataclasses.replace(FIRST, max_unreadable=0.2),
    )
    about = json.loads((stage.run(odd) / "stage.json").read_text())
    paths = lists.load(data / "lists", "clean").rows.set_index("id")["path"]
    assert sorted(paths[about["unreadable"]]) == ["class0/0.jpg", "class0/1.jpg"]


def test_too_many_unreadable_images_stop_the_stage_and_are_named(tmp_path, job):
    data = paint(tmp_path / "odd", classes=3, each=6, odd=4)
    lists.build(sources.from_folders(data, held_out=0), data, data / "lists")
    odd = dataclasses.replace(job, data=data, lists=data / "lists")
    some = set(lists.load(data / "lists", "clean").ids[:4])
    with pytest.raises(ValueError, match="cannot be read") as error:
        stage.run(odd)
    assert any(name in str(error.value) for name in some)
    assert not (odd.folder / "stage.json").exists()


def test_a_loss_that_is_no_number_stops_the_stage_and_names_the_step(job):
    wild = dataclasses.replace(job, stage=change(FIRST, lr=1e30))
    with pytest.raises(
        FloatingPointError, match=r"stage first: the loss is .* step \d+"
    ):
        stage.run(wild)


def test_a_batch_must_split_over_the_processes():
    with pytest.raises(ValueError, match="a batch of 5 does not split over 2"):
        stage.Batches(10, 5, 1, 0, world=2)


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no field 'epoch'; fields: .*epochs"):
        change(FIRST, epoch=3)
    assert change(FIRST, epochs=3, flip=0.0).augment.flip == 0.0
    with pytest.raises(ValueError, match="optimizer 'sgdm' is not one of sgd, adamw"):
        change(FIRST, optimizer="sgdm")


def test_a_job_survives_its_file(job):
    assert Job.read(job.write()) == job


def test_a_missing_list_and_a_missing_stage_are_named(job):
    with pytest.raises(FileNotFoundError, match="no list c3x"):
        stage.run(dataclasses.replace(job, stage=change(FIRST, images="c3x")))
    with pytest.raises(FileNotFoundError, match="no model in .*zero"):
        stage.run(dataclasses.replace(job, stage=change(FIRST, init="zero")))


def run_ranks(job: Job) -> bytes:
    launch.launch(
        "kit.training.stage",
        [str(job.write())],
        processes=2,
        logs=job.folder / "logs",
    )
    return weights(job.folder)


def test_two_processes_train_one_model_and_resume_to_the_same_bits(job, tmp_path):
    whole = run_ranks(dataclasses.replace(job, runs=tmp_path / "whole"))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "-m", "kit.training.stage", str(job.write())),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    give_up = time.monotonic() + 60
    while not (job.folder / "resume" / "state.pt").exists() and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run_ranks(job) == whole


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(job, tmp_path):
    seed = int(os.environ.get("KIT_TEST_SEED", time.time_ns() % 2**32))
    print(f"KIT_TEST_SEED={seed}")
    rng = random.Random(seed)
    job = dataclasses.replace(job, stage=change(FIRST, epochs=12), workers=1)
    whole = weights(stage.run(dataclasses.replace(job, runs=tmp_path / "whole")))
    path = job.write()
    threads = str(torch.get_num_threads())
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", "kit.training.stage", str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(3, 7))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert weights(stage.run(job)) == whole
