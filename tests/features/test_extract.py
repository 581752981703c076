import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from kit import config, files, launch
from kit.data import lists, sources
from kit.data.inputs import InputSpec
from kit.features import extract, store
from kit.features.extract import Job, embed
from kit.models import net as nets

SPEC = InputSpec(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
CROP = replace(SPEC, size=48, resize="crop", colour="bgr")
SHAPES = [(64, 64), (70, 130), (131, 67), (40, 50), (200, 64), (33, 90), (64, 96)]
BAD = ["bad/cut.jpg", "bad/text.jpg", "bad/gone.jpg"]
SEEN = {"f" * 64: "clean"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Hides the GPU of the machine, from ranks too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 photos of many shapes, three files that are none, and lists of them."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    names = [f"photos/{number:02}.jpg" for number in range(21)]
    (root / "photos").mkdir()
    (root / "bad").mkdir()
    for number, name in enumerate(names):
        coarse = random.integers(0, 256, (15, 16, 3), dtype=np.uint8)
        height, width = SHAPES[number % len(SHAPES)]
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / name), picture)
    whole = (root / names[0]).read_bytes()
    (root / "bad/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "bad/text.jpg").write_text("no image")
    paths = [*names[:5], "bad/cut.jpg", "bad/text.jpg", *names[5:], "bad/gone.jpg"]
    table = pd.DataFrame({"path": paths, "label": "a"})
    table.to_csv(root / "table.csv", index=False)
    facts = sources.from_csv(root / "table.csv", root)
    facts.index = facts.train.iloc[[2, 1, 2, 0, 1, 2]]  # images that stand there twice
    lists.build(facts, root, root / "lists", sizes=False)
    return root


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    config = nets.NetConfig("test_resnet", neck="none", input=SPEC)
    return nets.build(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory, net):
    return nets.save(net, tmp_path_factory.mktemp("runs") / "clean", SEEN)


@pytest.fixture
def job(tmp_path, data, model):
    return Job(
        model, data / "lists", "full", data, tmp_path / "full", batch=5, workers=0
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 images: the 24 of the list are 6 of them."""
    monkeypatch.setattr(extract, "BLOCK", 4)


def pixels(path: Path, spec: InputSpec) -> torch.Tensor | None:
    """(1, 3, size, size) normalised, or None: decode, cut, resize, normalise."""
    image = cv2.imread(str(path)) if path.parent.name != "bad" else None
    if image is None:
        return None
    height, width = image.shape[:2]
    if spec.resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    shrinks = min(image.shape[:2]) >= spec.size
    image = cv2.resize(
        image,
        (spec.size, spec.size),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    if spec.colour == "rgb":
        image = image[:, :, ::-1]
    planes = []
    for channel in range(3):
        plane = image[:, :, channel].astype(np.float64) / 255
        planes.append((plane - spec.mean[channel]) / spec.std[channel])
    return torch.from_numpy(np.stack(planes)[None]).float()


@torch.inference_mode()
def by_hand(net, root: Path, paths, sides=None, flip=False) -> np.ndarray:
    """Features of one image after another."""
    spec, found = net.config.input, []
    for path in paths:
        x = pixels(root / path, spec)
        if x is None:
            found.append(np.zeros(net.dim))
            continue
        total = np.zeros(net.dim)
        for side in sides or [spec.size]:
            scaled = x
            if side != spec.size:
                scaled = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            total += net(scaled)[0].double().numpy()
            if flip:
                total += net(scaled.flip(3))[0].double().numpy()
        found.append(total / math.sqrt((total**2).sum()))
    return np.stack(found)


# The definition


@pytest.mark.parametrize("spec", [SPEC, CROP], ids=["squash rgb", "crop bgr"])
@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_what_one_image_after_another_gives(
    data, job, tmp_path, spec, workers
):
    torch.manual_seed(1)
    config = nets.NetConfig("test_resnet", dim=24, input=spec)
    net = nets.build(config).eval()
    model = nets.save(net, tmp_path / "other", SEEN)
    job = replace(job, model=model, workers=workers)
    features = store.load(extract.run(job))
    rows = lists.load(data / "lists", "full").rows
    expected = by_hand(net, data, rows["path"])
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    assert features.ids.tolist() == rows["id"].tolist()
    assert len(np.unique(expected.round(2), axis=0)) == 22  # 21 photos and none


def test_the_manifest_says_what_made_the_features(data, job, model):
    features = store.load(extract.run(job))
    whole = lists.load(data / "lists", "full")
    about = features.manifest
    assert about["model"] == {"name": "clean", "hash": nets.describe(model)["hash"]}
    assert about["list"] == {"name": "full", "hash": whole.hash}
    assert about["seen"] == SEEN
    assert (about["scales"], about["flip"]) == ([1.0], False)
    assert about["complete"] is True
    store.expect(features, list_hash=whole.hash)


def test_unreadable_images_are_rows_of_zeros_and_are_named(data, job):
    features = store.load(extract.run(job))
    rows = lists.load(data / "lists", "full").rows
    bad = rows["path"].isin(BAD).to_numpy()
    assert bad.sum() == 3
    assert features.manifest["unreadable"] == rows["id"][bad].tolist()
    assert not features.vectors[bad].any()
    lengths = np.linalg.norm(features.vectors.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths[~bad], 1, atol=1e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_mirror_images_add_up(data, job, net, flip):
    job = replace(job, scales=(0.707, 1.0, 1.414, 0.1), flip=flip)
    features = store.load(extract.run(job))
    paths = lists.load(data / "lists", "full").rows["path"]
    # 64 times the scale, down to a multiple of 16, not below 32
    expected = by_hand(net, data, paths, sides=[32, 64, 80, 32], flip=flip)
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    alone = by_hand(net, data, paths)
    assert np.abs(expected - alone).max() > 0.02


def test_an_image_that_stands_in_the_list_twice_is_extracted_once(data, job):
    listed = lists.load(data / "lists", "index")
    assert len(listed) == 6
    features = store.load(extract.run(replace(job, images="index")))
    assert features.ids.tolist() == listed.ids[[0, 1, 3]].tolist()
    rows = features.find(listed.ids)
    assert rows.tolist() == [0, 1, 0, 2, 1, 0]
    whole = store.load(extract.run(replace(job, out=job.out.with_name("whole"))))
    np.testing.assert_allclose(
        features.vectors, whole.vectors[whole.find(features.ids)], atol=1e-3
    )


# embed


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 64, 64), generator=random, dtype=torch.uint8)


def test_embeddings_have_unit_length_and_do_not_depend_on_their_batch(net, batch):
    together = embed(net, batch, (1.0, 0.7), True)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    alone = torch.cat([embed(net, image[None], (1.0, 0.7), True) for image in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_mirrored_image_has_the_same_embedding_where_mirrors_count(net, batch):
    mirrored = batch.flip(-1)
    torch.testing.assert_close(
        embed(net, batch, flip=True), embed(net, mirrored, flip=True)
    )
    assert not torch.allclose(embed(net, batch), embed(net, mirrored), atol=1e-3)


def test_the_order_of_scales_does_not_matter(net, batch):
    there = embed(net, batch, (0.7, 1.0, 1.4))
    torch.testing.assert_close(there, embed(net, batch, (1.4, 0.7, 1.0)))


@pytest.mark.parametrize(("scale", "side"), [(0.5, 32), (0.77, 48), (1.5, 96)])
def test_a_scale_adds_embeddings_before_their_length_is_made_1(net, batch, scale, side):
    with torch.inference_mode():
        x = net.config.input.normalise(batch)
        scaled = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        expected = F.normalize(net(x) + net(scaled))
    torch.testing.assert_close(embed(net, batch, (1.0, scale)), expected)


def test_images_are_not_modified(net, batch):
    before = batch.clone()
    embed(net, batch, (1.0, 0.7), True)
    assert torch.equal(batch, before)


# Going on


@pytest.mark.parametrize("batch", [1, 3, 4, 50])
def test_going_on_gives_the_same_bytes(job, small_blocks, batch):
    job = replace(job, batch=batch)
    extract.run(job)
    before = {path.name: path.read_bytes() for path in job.out.iterdir()}
    vectors, done = store.open_for_writing(job.out)
    for block in (0, 2, 3, 5):
        vectors[block * 4 : block * 4 + 4] = np.nan
        done[block] = 0
    vectors.flush()
    done.flush()
    extract.run(job)
    assert {path.name: path.read_bytes() for path in job.out.iterdir()} == before


def test_blocks_that_are_there_already_are_kept(job, small_blocks):
    extract.run(job)
    vectors, done = store.open_for_writing(job.out)
    vectors[4:12] = 7
    done[2] = 0
    del vectors, done
    features = store.load(extract.run(job))
    assert (features.vectors[4:8] == 7).all()
    assert not (features.vectors[8:12] == 7).any()


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    job, small_blocks, monkeypatch
):
    job = replace(job, batch=3)  # two batches a block of four
    expected = extract.run(replace(job, out=job.out.with_name("whole")))
    embed, batches = extract.embed, []

    def killed(*arguments):
        batches.append(1)
        if len(batches) == 6:
            raise Killed
        return embed(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extract, "embed", killed)
        extract.run(job)
    with pytest.raises(ValueError, match="has not finished"):
        store.load(job.out)
    assert store.open_for_writing(job.out)[1].tolist() == [1, 1, 0, 0, 0, 0]
    extract.run(job)
    for name in ("vectors.npy", "ids.npy", "done.npy", "manifest.json"):
        assert (job.out / name).read_bytes() == (expected / name).read_bytes()


def test_when_the_time_is_over_blocks_are_kept_and_the_next_run_goes_on(
    job, small_blocks, monkeypatch
):
    expected = extract.run(replace(job, out=job.out.with_name("whole")))
    monkeypatch.setenv("KIT_STOP_AT", "1")
    for blocks in (1, 2):
        with pytest.raises(launch.Stopped, match="full: stopped after 4 of"):
            extract.run(job)
        assert store.open_for_writing(job.out)[1].sum() == blocks
    monkeypatch.delenv("KIT_STOP_AT")
    for name in ("vectors.npy", "done.npy", "manifest.json"):
        done = extract.run(job) / name
        assert done.read_bytes() == (expected / name).read_bytes()


def test_features_do_not_depend_on_batch_or_block_size(job, monkeypatch):
    found = []
    for block, batch in ((512, 5), (4, 5), (7, 2), (24, 24)):
        monkeypatch.setattr(extract, "BLOCK", block)
        out = job.out.with_name(f"{block}")
        features = store.load(extract.run(replace(job, batch=batch, out=out)))
        found.append(np.array(features.vectors, np.float32))
        assert features.manifest["block"] == block
    for vectors in found[1:]:
        np.testing.assert_allclose(vectors, found[0], atol=1e-3)


def test_other_weights_replace_the_features(job, tmp_path, net):
    first = store.load(extract.run(job))
    before = np.array(first.vectors)
    torch.manual_seed(5)
    other = nets.save(nets.build(net.config), tmp_path / "clean", SEEN)
    second = store.load(extract.run(replace(job, model=other)))
    assert second.manifest["model"]["name"] == first.manifest["model"]["name"]
    assert second.manifest["model"]["hash"] != first.manifest["model"]["hash"]
    assert not np.allclose(second.vectors, before, atol=0.01)


def test_finished_features_are_not_computed_again(job, monkeypatch):
    extract.run(job)
    monkeypatch.setattr(nets, "load", lambda *_: pytest.fail("the network was loaded"))
    extract.run(job)


# Ranks


def as_two_ranks(job, monkeypatch, slow):
    """Runs the job as two ranks, threads here: the slow one starts when the other has nothing to do."""
    here, meeting, changed = (
        threading.local(),
        threading.Barrier(2),
        threading.Condition(),
    )
    arrived = [0, 0]  # at how many barriers

    @contextmanager
    def group():
        yield launch.Rank(here.rank, 2, here.rank, torch.device("cpu"))

    def arrive(count):
        with changed:
            arrived[here.rank] += count
            changed.notify_all()

    def barrier():
        arrive(1)
        meeting.wait(30)
        if here.rank == slow:
            with changed:
                ahead = changed.wait_for(lambda: arrived[1 - slow] > arrived[slow], 30)
            assert ahead

    def run(number):
        here.rank = number
        try:
            extract.run(job)
        except BaseException:
            meeting.abort()
            raise
        finally:
            arrive(1000)

    monkeypatch.setattr(extract.launch, "group", group)
    monkeypatch.setattr(extract.dist, "barrier", barrier)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run, number) for number in (0, 1)]:
            done.result()


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_slow_leaves_no_block_out(job, small_blocks, monkeypatch, slow):
    alone = store.load(extract.run(replace(job, out=job.out.with_name("alone"))))
    as_two_ranks(job, monkeypatch, slow)
    together = store.load(job.out)
    assert together.ids.tolist() == alone.ids.tolist()
    np.testing.assert_allclose(together.vectors, alone.vectors, atol=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_features_of_one(job, tmp_path):
    alone = store.load(extract.run(replace(job, out=tmp_path / "alone")))
    launch.launch(
        "kit.features.extract", [str(job.write())], processes=2, logs=tmp_path / "logs"
    )
    together = store.load(job.out)
    assert together.ids.tolist() == alone.ids.tolist()
    assert together.manifest == alone.manifest
    np.testing.assert_allclose(together.vectors, alone.vectors, atol=1e-3)


# Jobs and refusals


def test_a_job_survives_its_file(job):
    job = replace(job, scales=(0.7, 1.0), flip=True, batch=3)
    path = job.write()
    assert path == job.out / "job.json"
    assert config.read(Job, path) == job
    assert json.loads(path.read_text())["out"] == str(job.out)


def test_main_runs_the_job_of_a_file_and_tells_how_far_it_is(job, caplog):
    caplog.set_level(logging.INFO)
    extract.main([str(job.write())])
    assert len(store.load(job.out)) == 24
    assert "full      24/24 images" in caplog.text


def test_a_folder_that_the_list_s_paths_do_not_start_from_is_refused(job, data):
    wrong = replace(job, data=data / "photos")
    with pytest.raises(FileNotFoundError, match=r"photos/00\.jpg is not there"):
        extract.run(wrong)
    assert not job.out.exists()


def test_a_missing_list_or_model_is_refused_and_leaves_nothing(job, tmp_path):
    with pytest.raises(FileNotFoundError, match="no list nothing in .*00_image_lists"):
        extract.run(replace(job, images="nothing"))
    with pytest.raises(FileNotFoundError, match="no model in .*02_train_stage"):
        extract.run(replace(job, model=tmp_path / "nothing"))
    assert not job.out.exists()


def test_the_untrained_model_is_the_backbone_without_a_neck(tmp_path):
    config = nets.NetConfig("test_resnet", dim=24, input=SPEC)
    folder = extract.untrained(config, tmp_path / "untrained")
    net = nets.load(folder)
    assert net.config == replace(config, neck="none")
    assert net.dim == net.backbone.num_features
    assert nets.describe(folder)["seen"] == {}
    before = files.sha256(folder / "model.safetensors")
    extract.untrained(config, folder)  # is there already; other weights would be random
    assert files.sha256(folder / "model.safetensors") == before
