import dataclasses
import json
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
from kit.models import net as nets
from kit.models.net import NetConfig
from kit.training import checkpoints, stage
from kit.training.job import Job, Stage, change
from kit.training.optim import Optim

ROOT = Path(__file__).resolve().parents[2]
NET = NetConfig("test_efficientnet", dim=16, input=InputSpec(32))
FIRST = Stage(
    "first",
    images="clean",
    size=32,
    epochs=2,
    batch=4,
    optim=Optim(1e-2),
    augment=Augment(crop=0.5, jitter=0.2, erase=0.5),
)


def paint(
    folder: Path, classes: int, each: int, odd: int = 0, noise: float = 20
) -> Path:
    """A folder per class of noisy flat colours; the first `odd` files are cut short."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        colour = rng.integers(40, 215, 3)
        for number in range(each):
            path = folder / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = (colour + rng.normal(0, noise, (40, 48, 3))).clip(0, 255)
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


def test_training_lowers_the_loss_and_leaves_a_whole_checkpoint(job):
    plan = change(FIRST, epochs=12, batch=9, crop=1.0, jitter=0.0, erase=0.0)
    folder = stage.run(dataclasses.replace(job, stage=plan))
    log = checkpoints.read_log(folder)
    assert np.mean(log["loss"][-4:]) < 0.6 * np.mean(log["loss"][:4])
    assert log["step"] == list(range(1, 12 * 2 + 1))  # 18 images
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {
        *("model.safetensors", "model.json", "head.safetensors"),
        *("stage.json", "log.csv", "tensorboard"),
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
    lists.describe_file(copy / "clean.csv", about)
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
    some = set(lists.load(data / "lists", "clean").rows["path"][:4])
    with pytest.raises(ValueError, match="cannot be read") as error:
        stage.run(odd)
    assert any(name in str(error.value) for name in some)
    assert not (odd.folder / "stage.json").exists()


def test_a_loss_that_is_no_number_stops_the_stage_and_names_the_step(job):
    wild = dataclasses.replace(job, stage=change(FIRST, lr=1e12))
    with pytest.raises(
        FloatingPointError, match=r"stage first: the loss is .* step \d+"
    ):
        stage.run(wild)


OPTIONS = {
    "average": {"ema": 0.9},
    "frozen norms": {"frozen_norms": True},
    "adamw and clipping": {"optimizer": "adamw", "lr": 1e-3, "clip": 1.0},
    "layer decay": {"layer_decay": 0.7},
    "aspect groups": {"template": "SS", "size": 64, "batch": 6},
    "thawing": {"freeze": 1},
    "another head": {"loss": "cosface", "centres": 2, "smoothing": 0.1},
    "class means": {"centre_loss": 0.01, "triplet": 0.1},
    "class balanced": {"order": "class_balanced", "epoch_size": 12},
    "a part of a schedule": {"epochs": 5, "start": 2, "stop": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_resumes_to_the_same_bits(job, interrupt, tmp_path, options):
    job = dataclasses.replace(job, stage=change(FIRST, **options))
    whole = weights(stage.run(dataclasses.replace(job, runs=tmp_path / "whole")))
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        stage.run(job)
    interrupt(-1)
    assert weights(stage.run(job)) == whole
    plain = dataclasses.replace(job, stage=FIRST, runs=tmp_path / "plain")
    assert weights(stage.run(plain)) != whole


@pytest.mark.slow
def test_adapters_learn_in_a_vits_place_and_are_merged_at_the_end(job):
    net = NetConfig("test_vit", dim=16, input=InputSpec(32))
    adapted = dataclasses.replace(job, net=net, stage=change(FIRST, lora=2))
    folder = stage.run(adapted)
    torch.manual_seed(FIRST.seed)
    before, after = nets.build(adapted.kept), nets.load(folder)
    changed = {
        name
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert any("attn.qkv.weight" in name for name in changed)
    assert not any("bias" in name and "backbone" in name for name in changed)
    with pytest.raises(ValueError, match="test_efficientnet has no linear layer"):
        stage.run(dataclasses.replace(job, stage=change(FIRST, lora=2)))


def test_the_backbone_stands_still_while_it_is_frozen(job):
    frozen = dataclasses.replace(job, stage=change(FIRST, freeze=2))
    torch.manual_seed(FIRST.seed)
    before = nets.build(frozen.kept).backbone.state_dict()
    after = nets.load(stage.run(frozen)).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_norms_keep_their_statistics(job):
    job = dataclasses.replace(job, stage=change(FIRST, frozen_norms=True))
    net = nets.load(stage.run(job))
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((norm.running_mean == 0).all() for norm in norms)


def test_parts_of_a_batch_add_up_to_it(job, tmp_path):
    """Without batch statistics a step in two parts is the step as a whole."""
    still = change(FIRST, frozen_norms=True, epochs=1, lr=1e-3)
    whole = nets.load(stage.run(dataclasses.replace(job, stage=still)))
    parts = dataclasses.replace(job, stage=still, runs=tmp_path / "p", accumulate=2)
    for a, b in zip(
        whole.parameters(), nets.load(stage.run(parts)).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(
        ValueError, match="4 images a process do not split into 3 parts"
    ):
        stage.run(dataclasses.replace(job, runs=tmp_path / "q", accumulate=3))


def test_recomputed_activations_train_the_same(job, tmp_path):
    """Running statistics, too: timm's own recomputing counts every batch twice in them."""
    kept = stage.run(job)
    again = dataclasses.replace(job, runs=tmp_path / "again", checkpointing=True)
    assert weights(kept) == weights(stage.run(again))


def test_decoding_on_the_device_trains_nearly_the_same(job, tmp_path):
    """Another decoder and another resize rule, which flat pictures do not notice."""
    data = paint(tmp_path / "flat", classes=3, each=6, noise=0)
    lists.build(sources.from_folders(data, held_out=0), data, data / "lists")
    plain = change(FIRST, crop=1.0, jitter=0.0, lr=1e-6, frozen_norms=True)
    job = dataclasses.replace(job, stage=plain, data=data, lists=data / "lists")
    device = dataclasses.replace(job, runs=tmp_path / "device", gpu_decode=True)
    losses = [checkpoints.read_log(stage.run(each))["loss"] for each in (job, device)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    seeded = dataclasses.replace(device, stage=change(plain, seed=1))
    other = checkpoints.read_log(stage.run(seeded))["loss"]
    assert not np.allclose(other, losses[0], rtol=0.02)
    with pytest.raises(ValueError, match="jitter is not done on the device"):
        stage.run(
            dataclasses.replace(
                job,
                stage=change(plain, jitter=0.1),
                runs=tmp_path / "x",
                gpu_decode=True,
            )
        )


def test_a_tail_goes_on_in_its_schedule(job):
    """The learning rate of a tail is that of the last epochs of the whole schedule."""
    whole = dataclasses.replace(job, stage=change(FIRST, epochs=3))
    most = dataclasses.replace(
        job, stage=dataclasses.replace(FIRST, name="most", epochs=3, stop=2)
    )
    tail = dataclasses.replace(
        job,
        stage=dataclasses.replace(
            most.stage, name="tail", init="most", start=2, stop=0
        ),
    )
    logs = [checkpoints.read_log(stage.run(each)) for each in (whole, most, tail)]
    assert logs[1]["lr"] + logs[2]["lr"] == logs[0]["lr"]
    assert logs[1]["epoch"] + logs[2]["epoch"] == logs[0]["epoch"]


def test_the_classifier_is_handed_over_or_not(job):
    stage.run(job)
    first = (job.folder / "head.safetensors").read_bytes()
    still = dataclasses.replace(
        FIRST, name="second", init="first", epochs=1, optim=Optim(1e-12)
    )
    for keep in (True, False):
        after = stage.run(
            dataclasses.replace(job, stage=dataclasses.replace(still, keep_head=keep))
        )
        rows = after / "head.safetensors"
        near = np.allclose(
            np.frombuffer(rows.read_bytes()[-192:], np.float32),
            np.frombuffer(first[-192:], np.float32),
            atol=1e-6,
        )
        assert near == keep


def test_when_the_time_is_over_the_stage_is_saved_and_goes_on(
    job, monkeypatch, tmp_path
):
    whole = weights(stage.run(dataclasses.replace(job, runs=tmp_path / "whole")))
    monkeypatch.setenv("KIT_STOP_AT", "1")
    with pytest.raises(launch.Stopped, match="stage first: stopped at step 1 of 10"):
        stage.run(job)
    with pytest.raises(launch.Stopped, match="step 2 of 10"):
        stage.run(job)
    monkeypatch.delenv("KIT_STOP_AT")
    assert weights(stage.run(job)) == whole


def test_nothing_is_saved_after_a_loss_that_is_no_number(job):
    wild = dataclasses.replace(
        job, stage=change(FIRST, lr=1e12), log_every=50, save_every=3
    )
    with pytest.raises(FloatingPointError, match="at step [12]"):
        stage.run(wild)
    assert not (wild.folder / "resume" / "state.pt").exists()


def test_a_missing_list_and_a_missing_stage_are_named(job):
    with pytest.raises(FileNotFoundError, match="no list c3x"):
        stage.run(dataclasses.replace(job, stage=change(FIRST, images="c3x")))
    with pytest.raises(FileNotFoundError, match="no model in .*zero"):
        stage.run(dataclasses.replace(job, stage=change(FIRST, init="zero")))


def run_ranks(job: Job, processes: int = 2) -> bytes:
    launch.launch(
        "kit.training.stage",
        [str(job.write())],
        processes=processes,
        logs=job.folder / "logs",
    )
    return weights(job.folder)


def test_one_process_goes_on_as_two(job, interrupt, tmp_path):
    """Weights agree to rounding: without batch statistics nothing depends on the split."""
    still = dataclasses.replace(
        job, stage=change(FIRST, frozen_norms=True, optimizer="adamw", lr=1e-4)
    )
    whole = nets.load(stage.run(dataclasses.replace(still, runs=tmp_path / "whole")))
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        stage.run(still)
    interrupt(-1)
    run_ranks(still)
    log = (still.folder / "logs").rglob("stdout.log")
    assert any("goes on from step 4" in path.read_text() for path in log)
    for a, b in zip(
        whole.parameters(), nets.load(still.folder).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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
