import json
import logging
import math
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from kit import checksums, config, files, launch
from kit.data import images, lists, shards, sources, tars
from kit.data.inputs import InputSpec
from kit.data.readers import open_reader
from kit.features import extract, fill, store
from kit.features.extract import Job
from kit.features.views import Views, embed
from kit.models import net as nets

SPEC = InputSpec(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
OTHER = replace(SPEC, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
CROP = replace(SPEC, size=48, resize="crop", colour="bgr")
SHAPES = [(64, 64), (70, 130), (131, 67), (40, 50), (200, 64), (33, 90), (64, 96)]
SHAPES += [(75, 100), (100, 70)]
BAD = ["bad/cut.jpg", "bad/text.jpg", "bad/gone.jpg"]
SEEN = {"f" * 64: "clean"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Hides the GPU of the machine, from ranks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


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
    lists.build(facts, root, root / "sized")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three networks by name; two have one input, each its own embedding."""
    runs, found = tmp_path_factory.mktemp("runs"), {}
    torch.manual_seed(0)
    for name, network in {
        "clean": nets.NetConfig("test_resnet", neck="none", input=SPEC),
        "c2x": nets.NetConfig("test_resnet", dim=16, input=OTHER),
        "other/all": nets.NetConfig("test_resnet", dim=24, input=CROP),
    }.items():
        found[name] = nets.build(network).eval()
        nets.save(found[name], runs / name, SEEN)
    return runs, found


@pytest.fixture(scope="module")
def net(made):
    return made[1]["clean"]


@pytest.fixture
def job(tmp_path, data, made):
    where = data / "lists", "full", data, tmp_path / "features"
    return Job(made[0], ("clean",), *where, batch=5, workers=0)


@pytest.fixture
def three(job, made):
    """One job of all models."""
    return replace(job, models=tuple(made[1]))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 images: the 24 of the list are 6 of them."""
    monkeypatch.setattr(fill, "BLOCK", 4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Job -> contents of the stores that one run of it fills in blocks of 4, made once."""

    @cache
    def run(job: Job) -> list[dict[str, bytes]]:
        job = replace(job, features=tmp_path_factory.mktemp("undisturbed"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fill, "BLOCK", 4)
            return [contents(folder) for folder in extract.run(job)]

    return lambda job: run(replace(job, features=Path(), workers=0))


def extracted(job: Job) -> store.Features:
    (folder,) = extract.run(job)
    return store.load(folder)


def contents(folder: Path) -> dict[str, bytes]:
    names = ("ids.npy", "vectors.npy", "done.npy", "manifest.json")
    return {name: (folder / name).read_bytes() for name in names}


def maps(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """vectors and done, to change by hand."""
    return tuple(
        np.load(folder / name, mmap_mode="r+") for name in ("vectors.npy", "done.npy")
    )


def reopen(folder: Path) -> None:
    """As a run leaves a store that was killed before its end."""
    about = checksums.read_manifest(folder / "manifest.json", "")
    checksums.write_manifest(folder / "manifest.json", about | {"complete": False})


def pixels(path: Path, spec: InputSpec, shape) -> torch.Tensor | None:
    """(1, 3, h, w) normalised, or None: decode, cut, resize, normalise."""
    image = cv2.imread(str(path)) if path.parent.name != "bad" else None
    if image is None:
        return None
    height, width = image.shape[:2]
    if spec.resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    shrinks = image.shape[0] >= shape[0] and image.shape[1] >= shape[1]
    image = cv2.resize(
        image,
        shape[::-1],
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    if spec.colour == "rgb":
        image = image[:, :, ::-1]
    planes = []
    for channel in range(3):
        plane = image[:, :, channel].astype(np.float64) / 255
        planes.append((plane - spec.mean[channel]) / spec.std[channel])
    return torch.from_numpy(np.stack(planes)[None]).float()


@cache  # many tests ask for the same
@torch.inference_mode()
def embedding(net, path: Path, shape, mirrored: bool) -> np.ndarray | None:
    x = pixels(path, net.config.input, shape)
    if x is None:
        return None
    return net(x.flip(3) if mirrored else x)[0].double().numpy()


def by_hand(
    net, root: Path, paths, shapes=None, flip=False, normalise=False
) -> np.ndarray:
    """Features of one image after another; shapes: of a path's scales."""
    spec, found = net.config.input, []
    for path in paths:
        total = np.zeros(net.dim)
        for shape in shapes(path) if shapes else [(spec.size, spec.size)]:
            for mirrored in (False, True)[: 1 + flip]:
                vector = embedding(net, root / path, shape, mirrored)
                if vector is not None:
                    length = math.sqrt((vector**2).sum()) if normalise else 1
                    total += vector / length
        found.append(total / max(1e-9, math.sqrt((total**2).sum())))
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
    nets.save(net, tmp_path / "other", SEEN)
    features = extracted(
        replace(job, runs=tmp_path, models=("other",), workers=workers)
    )
    rows = lists.load(data / "lists", "full").rows
    expected = by_hand(net, data, rows["path"])
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    assert features.ids.tolist() == rows["id"].tolist()
    assert len(np.unique(expected.round(2), axis=0)) == 22  # 21 photos and none


def test_the_manifest_says_what_made_the_features(data, job, made):
    about = extracted(job).manifest
    whole = lists.load(data / "lists", "full")
    weights = nets.describe(made[0] / "clean")["hash"]
    assert about["model"] == {"name": "clean", "hash": weights}
    assert about["list"] == {"name": "full", "hash": whole.hash}
    assert about["seen"] == SEEN
    views = {"size": 64, "template": "square", "scales": [1.0], "multiple": 16}
    views |= {"least": 32, "flip": False, "normalise": False}
    assert views.items() <= about.items()
    assert about["complete"] is True
    store.expect(store.load(job.folder), list_hash=whole.hash)


def test_unreadable_images_are_rows_of_zeros_and_are_named_in_every_store(data, three):
    rows = lists.load(data / "lists", "full").rows
    bad = rows["path"].isin(BAD).to_numpy()
    assert bad.sum() == 3
    for folder in extract.run(three):
        features = store.load(folder)
        assert features.manifest["unreadable"] == rows["id"][bad].tolist()
        assert not features.vectors[bad].any()
        lengths = np.linalg.norm(features.vectors.astype(np.float64), axis=1)
        np.testing.assert_allclose(lengths[~bad], 1, atol=1e-3)


def test_an_image_that_stands_in_the_list_twice_is_extracted_once(data, job):
    listed = lists.load(data / "lists", "index")
    assert len(listed) == 6
    features = extracted(replace(job, images="index"))
    assert features.ids.tolist() == listed.ids[[0, 1, 3]].tolist()
    rows = features.find(listed.ids)
    assert rows.tolist() == [0, 1, 0, 2, 1, 0]
    whole = extracted(job)
    np.testing.assert_allclose(
        features.vectors, whole.vectors[whole.find(features.ids)], atol=1e-3
    )


def relisted(lists_folder: Path, out: Path, rows: pd.DataFrame) -> None:
    """List `full` with other rows."""
    out.mkdir()
    rows.to_csv(out / "full.csv", index=False, lineterminator="\n")
    about = files.read_json(lists_folder / "full.json")
    lists.describe_file(out / "full.csv", about)


def test_images_without_a_label_are_extracted_too(data, job, tmp_path):
    rows = pd.read_csv(data / "lists/full.csv", dtype=str, keep_default_na=False)
    rows.loc[::2, "label"] = "-1"
    relisted(data / "lists", tmp_path / "lists", rows)
    some = extracted(replace(job, lists=tmp_path / "lists", features=tmp_path / "some"))
    whole = extracted(job)
    assert some.ids.tolist() == whole.ids.tolist()
    assert np.array_equal(some.vectors, whole.vectors)


def test_the_members_of_tars_do_as_well_as_files(data, three, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for folder in ("photos", "bad"):
            for path in sorted((data / folder).iterdir()):
                tar.add(path, path.relative_to(data))
    tars.index(tmp_path)
    packed = replace(three, data=tmp_path, features=tmp_path / "packed", workers=1)
    for ours, theirs in zip(extract.run(packed), extract.run(three), strict=True):
        assert contents(ours) == contents(theirs)


def test_shards_do_as_well_as_the_folder_of_their_pictures(three, data, tmp_path):
    paths = lists.load(data / "sized", "full").rows["path"]
    packs = tmp_path / "shards"
    shards.pack(open_reader(data), paths, packs, side=48, quality=95, per_shard=5)
    for path in packs.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "folder", filter="data")
    shapes = {images.read(tmp_path / "folder" / path).shape for path in paths[:5]}
    assert len(shapes) > 1  # not those that the list says
    how = Views(template="SS", size=64, scales=(1.0, 0.5), flip=True)
    models = ("clean", "c2x")
    job = replace(three, models=models, lists=data / "sized", views=how, workers=1)
    stores = {
        name: extract.run(replace(job, data=root, features=tmp_path / f"of {name}"))
        for name, root in (
            *(("shards", packs), ("folder", tmp_path / "folder"), ("whole", data)),
        )
    }
    for packed, folder, whole in zip(*stores.values(), strict=True):
        assert contents(packed) == contents(folder)
        ours, theirs = store.load(packed), store.load(whole)
        assert ours.manifest["unreadable"] == theirs.manifest["unreadable"]
        cosines = (np.float64(ours.vectors) * theirs.vectors).sum(1)
        assert (cosines[~paths.isin(BAD)] > 0.9).all()


# Sizes, shapes and scales


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_mirror_images_add_up(data, job, net, flip, normalise):
    views = Views(scales=(0.707, 1.0, 1.414, 0.1), flip=flip, normalise=normalise)
    features = extracted(replace(job, views=views))
    paths = lists.load(data / "lists", "full").rows["path"]
    # 64 times the scale, down to a multiple of 16, not below 32
    sides = [(side, side) for side in (32, 64, 80, 32)]
    expected = by_hand(net, data, paths, lambda _: sides, flip, normalise)
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    alone = by_hand(net, data, paths)
    assert np.abs(expected - alone).max() > 0.02
    for how in (flip, not normalise), (not flip, normalise):
        other = by_hand(net, data, paths, lambda _: sides, *how)
        assert np.abs(expected - other).max() > 5e-3


def test_another_size_overrides_the_model_s_own(data, job, net):
    features = extracted(replace(job, views=Views(size=96)))
    paths = lists.load(data / "lists", "full").rows["path"]
    expected = by_hand(net, data, paths, lambda _: [(96, 96)])
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    assert features.manifest["size"] == 96


TEMPLATES = {  # height, width from landscape to portrait
    "SS2 of 128": [(96, 160), (128, 160), (128, 128), (160, 128), (160, 96)],
    "L2": [(544, 800), (608, 800), (800, 800), (800, 608), (800, 544)],
    "SS": [(256, 384), (256, 256), (384, 256)],
}
BOUNDS = {5: (0.67, 0.77, 1.33, 1.5), 3: (0.77, 1.33)}


def in_template(name: str, data: Path, scales, multiple: int, least: int):
    """Path -> the shape of each scale, from the picture's own height and width."""

    def shapes(path):
        image = cv2.imread(str(data / path))
        if image is None:
            return [(9, 9)]
        height, width = image.shape[:2]
        table = TEMPLATES[name]
        group = sum(height / width >= bound for bound in BOUNDS[len(table)])
        return [
            tuple(
                side
                if s == 1
                else max(least, math.floor(side * s / multiple) * multiple)
                for side in table[group]
            )
            for s in scales
        ]

    return shapes


def test_images_take_the_template_s_shape_that_their_own_is_next_to(
    data, job, net, small_blocks
):
    how = {"template": "SS2", "size": 128, "multiple": 32, "least": 96}
    views = Views(scales=(0.9, 1.0), **how)
    job = replace(job, lists=data / "sized", views=views)
    few = extracted(replace(job, batch=2, features=job.features / "few"))
    features = extracted(replace(job, batch=50))
    paths = lists.load(data / "sized", "full").rows["path"]
    shapes = in_template("SS2 of 128", data, (0.9, 1.0), 32, 96)
    assert len({tuple(shapes(path)) for path in paths if path not in BAD}) == 5
    expected = by_hand(net, data, paths, shapes)
    np.testing.assert_allclose(features.vectors, expected, atol=5e-4)
    np.testing.assert_allclose(few.vectors, expected, atol=5e-4)
    square = by_hand(net, data, paths, lambda _: [(96, 96), (128, 128)])
    assert np.abs(expected - square).max() > 5e-3
    assert how.items() <= features.manifest.items()


def test_the_published_form_of_2019(data, job, net, tmp_path):
    scales = (0.75, 1.0, 1.25)
    views = Views(template="L2", scales=scales, multiple=32, least=128)
    rows = pd.read_csv(data / "sized/full.csv", dtype=str, keep_default_na=False)[1:2]
    relisted(data / "sized", tmp_path / "lists", rows)
    features = extracted(replace(job, lists=tmp_path / "lists", views=views))
    assert features.manifest["size"] == 800
    shapes = in_template("L2", data, scales, 32, 128)
    expected = by_hand(net, data, rows["path"], shapes)
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)


def test_images_keep_their_aspect_ratio_where_the_longest_side_is_given(data, job, net):
    views = Views(template="longest", size=96)
    job = replace(job, images="index", lists=data / "sized", views=views)
    rows = lists.load(data / "sized", "index").rows.drop_duplicates("id")
    sizes = {row.path: (row.height, row.width) for row in rows.itertuples()}

    def shapes(path):
        scale = 96 / max(sizes[path])
        return [tuple(max(1, round(side * scale)) for side in sizes[path])]

    assert len({shapes(path)[0] for path in sizes}) > 1
    expected = by_hand(net, data, rows["path"], shapes)
    np.testing.assert_allclose(extracted(job).vectors, expected, atol=2e-3)


def test_a_template_needs_a_list_with_heights_and_widths(job):
    with pytest.raises(ValueError) as error:
        extract.run(replace(job, views=Views(template="S2")))
    assert "list full has no heights and widths" in str(error.value)
    assert "template S2" in str(error.value) and "00_image_lists" in str(error.value)
    assert not job.folder.exists()


def test_a_model_s_own_template_is_used_or_replaced_by_a_square(
    data, job, net, tmp_path
):
    config = replace(net.config, input=replace(SPEC, template="SS", size=256))
    own = nets.build(config).eval()
    own.load_state_dict(net.state_dict())
    nets.save(own, tmp_path / "own", SEEN)
    job = replace(
        job, runs=tmp_path, models=("own",), lists=data / "sized", images="index"
    )
    paths = lists.load(data / "sized", "index").rows.drop_duplicates("id")["path"]
    features = extracted(job)
    assert features.manifest["template"] == "SS"
    expected = by_hand(own, data, paths, in_template("SS", data, (1,), 1, 1))
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)
    views = Views(template="square", size=64)
    features = extracted(replace(job, views=views))
    assert features.manifest["template"] == "square"
    expected = by_hand(own, data, paths, lambda _: [(64, 64)])
    np.testing.assert_allclose(features.vectors, expected, atol=2e-3)


def test_batches_hold_one_shape_and_every_row_of_the_block_once(monkeypatch):
    monkeypatch.setattr(fill, "BLOCK", 8)
    group = np.array([2, 0, 0, 2, 0, 0, 2, 0, 1, 1, 0])
    first, second = (fill.batches(group, block, 3) for block in (0, 1))
    assert [rows.tolist() for rows in first] == [[1, 2, 4], [5, 7], [0, 3, 6]]
    assert [rows.tolist() for rows in second] == [[10], [8, 9]]
    group[[1, 7, 8, 9, 10]] = fill.KNOWN  # and none that is known
    first, second = (fill.batches(group, block, 3) for block in (0, 1))
    assert [rows.tolist() for rows in first] == [[2, 4, 5], [0, 3, 6]]
    assert second == []


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ({"template": "L3"}, "template 'L3' is not one of own, square, SS, S, M"),
        ({"scales": ()}, "scales () are none, or not all above 0"),
        ({"scales": (1.0, 0.0)}, "scales (1.0, 0.0) are none, or not all above 0"),
        ({"multiple": 0}, "multiple is 0, not at least 1"),
        ({"least": 0}, "least is 0, not at least 1"),
        ({"size": -1}, "size is -1, not at least 0"),
    ],
)
def test_views_that_are_none_are_refused(views, words):
    with pytest.raises(ValueError) as error:
        Views(**views)
    assert str(error.value).startswith(words)


def test_a_central_square_has_no_template(three, data):
    job = replace(three, lists=data / "sized", views=Views(template="S2"))
    with pytest.raises(ValueError, match="template S2 takes the whole image"):
        extract.run(job)


# Several models


def alone(job: Job, undisturbed) -> list[dict[str, bytes]]:
    """Contents of the stores of one job a model."""
    return [undisturbed(replace(job, models=(name,)))[0] for name in job.models]


VIEWS = {
    "own": Views(),
    "scales": Views(scales=(0.707, 1.0, 1.414), flip=True),
    "size": Views(size=80, scales=(0.5,), normalise=True),
}


@pytest.mark.parametrize(("how", "workers"), [*zip(VIEWS, (0, 1, 0), strict=True)])
def test_models_that_share_a_decode_see_what_each_sees_alone(
    three, undisturbed, small_blocks, how, workers
):
    job = replace(three, views=VIEWS[how], workers=workers)
    together = extract.run(job)
    assert [str(path.relative_to(job.features)) for path in together] == [
        *("clean/full", "c2x/full", "other/all/full")
    ]
    assert [contents(folder) for folder in together] == alone(job, undisturbed)
    assert len({len(contents(path)["vectors.npy"]) for path in together}) == 3


def test_models_that_share_a_template_see_what_each_sees_alone(
    three, data, undisturbed, small_blocks
):
    views = Views(template="SS", size=64, scales=(0.5, 1.0))
    models = ("clean", "c2x")
    job = replace(three, models=models, lists=data / "sized", views=views)
    together = [contents(folder) for folder in extract.run(job)]
    assert together == alone(job, undisturbed)


@pytest.mark.parametrize(
    ("models", "inputs"), [(("clean", "c2x"), 2), (("clean", "c2x", "other/all"), 4)]
)
def test_a_picture_is_decoded_once_and_equal_inputs_are_made_once(
    three, monkeypatch, models, inputs
):
    counts = {"decode": 0, "prepare": 0}

    def counting(name, real):
        def counted(*arguments):
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(images, name, counted)

    counting("decode", images.decode)
    counting("prepare", images.prepare)
    extract.run(replace(three, models=models, views=Views(scales=(1.0, 0.5))))
    readable = 21
    assert counts == {"decode": readable + 2, "prepare": inputs * readable}


def test_models_of_a_job_are_named_once_and_lie_in_its_folder(three):
    for models, words in (
        ((), "are none, or one stands twice"),
        (("clean", "c2x", "clean"), "are none, or one stands twice"),
        (("../clean",), "model '../clean' is not a path inside"),
        (("/clean",), "model '/clean' is not a path inside"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(three, models=models)


# embed


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 64, 64), generator=random, dtype=torch.uint8)


def test_embeddings_have_unit_length_and_do_not_depend_on_their_batch(net, batch):
    scales = batch, batch[:, :, 8:-8, ::2]
    together = embed(net, scales, flip=True)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    alone = torch.cat(
        [embed(net, [scale[[row]] for scale in scales], flip=True) for row in range(4)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_mirrored_image_has_the_same_embedding_where_mirrors_count(net, batch):
    mirrored = batch.flip(-1)
    torch.testing.assert_close(
        embed(net, [batch], flip=True), embed(net, [mirrored], flip=True)
    )
    assert not torch.allclose(embed(net, [batch]), embed(net, [mirrored]), atol=1e-3)


def test_the_order_of_scales_does_not_matter(net, batch):
    small, large = batch[..., ::2, ::2], batch.repeat(1, 1, 1, 2)
    there = embed(net, [small, batch, large])
    torch.testing.assert_close(there, embed(net, [large, small, batch]))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_a_scale_adds_embeddings_before_their_length_is_made_1(
    net, batch, flip, normalise
):
    small = batch[..., 5:-5, ::2]
    total = torch.zeros(4, net.dim)
    with torch.inference_mode():
        for images in (batch, small):
            x = net.config.input.normalise(images)
            for seen in [x, x.flip(3)][: 1 + flip]:
                vectors = net(seen)
                total += F.normalize(vectors) if normalise else vectors
    expected = total / total.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embed(net, [batch, small], flip, normalise), expected)


def test_images_are_not_modified(net, batch):
    before = batch.clone()
    embed(net, [batch, batch], True, True)
    assert torch.equal(batch, before)


# Going on


@pytest.mark.parametrize("batch", [1, 3, 4, 50])
def test_going_on_gives_the_same_bytes(three, small_blocks, batch):
    job = replace(three, batch=batch)
    before = [contents(folder) for folder in extract.run(job)]
    for number, folder in enumerate(map(job.store, job.models)):
        vectors, done = maps(folder)
        for block in ((0, 2, 3, 5), (2, 4), ())[number]:
            vectors[block * 4 : block * 4 + 4] = np.nan
            done[block] = 0
        vectors.flush()
        done.flush()
        reopen(folder)
    assert [contents(folder) for folder in extract.run(job)] == before


def test_blocks_that_are_there_already_are_kept(job, small_blocks):
    extract.run(job)
    vectors, done = maps(job.folder)
    vectors[4:12] = 7
    done[2] = 0
    del vectors, done
    reopen(job.folder)
    features = extracted(job)
    assert (features.vectors[4:8] == 7).all()
    assert not (features.vectors[8:12] == 7).any()


def test_a_model_that_is_finished_is_left_alone(
    three, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    first, second, third = map(three.store, three.models)
    extract.run(replace(three, models=three.models[:2]))
    _, done = maps(second)
    done[3:5] = 0
    done.flush()
    loaded, written = [], []
    load, write = nets.load, store.Writer.write
    with monkeypatch.context() as patch:
        patch.setattr(
            nets, "load", lambda path, *rest: loaded.append(path) or load(path, *rest)
        )
        patch.setattr(
            store.Writer,
            "write",
            lambda to, block, values: (
                written.append((to.folder, block)) or write(to, block, values)
            ),
        )
        extract.run(three)
    assert [path.name for path in loaded] == ["c2x", "all"]
    assert [block for folder, block in written if folder == second] == [3, 4]
    assert [block for folder, block in written if folder == third] == [*range(6)]
    assert len(written) == 8
    assert [contents(folder) for folder in (first, second, third)] == expected


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", [0, 1, 3, 5, 14, 22])
def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    three, small_blocks, monkeypatch, undisturbed, calls
):
    # two batches a block of four, each for two models
    job = replace(three, models=("clean", "other/all"), batch=3)
    expected = undisturbed(job)
    real, left = fill.embed, [None] * calls

    def killed(*arguments):
        if not left:
            raise Killed
        left.pop()
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fill, "embed", killed)
        extract.run(job)
    for folder in map(job.store, job.models):
        with pytest.raises(ValueError, match="has not finished"):
            store.load(folder)
        done = calls // 4
        assert maps(folder)[1].clip(max=1).tolist() == [1] * done + [0] * (6 - done)
    assert [contents(folder) for folder in extract.run(job)] == expected


def test_a_run_that_was_killed_between_two_models_goes_on_and_ends_the_same(
    three, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    real, left = store.Writer.write, [None] * 4

    def killed(*arguments):
        if not left:
            raise Killed
        left.pop()
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store.Writer, "write", killed)
        extract.run(three)
    done = [np.count_nonzero(maps(three.store(name))[1]) for name in three.models]
    assert done == [2, 1, 1]
    assert [contents(folder) for folder in extract.run(three)] == expected


def test_when_the_time_is_over_blocks_are_kept_and_the_next_run_goes_on(
    three, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    monkeypatch.setenv("KIT_STOP_AT", "1")
    for blocks in (1, 2):
        left = 24 - 4 * (blocks - 1)
        with pytest.raises(launch.Stopped, match=f"full: stopped after 4 of {left} im"):
            extract.run(three)
        for name in three.models:
            assert np.count_nonzero(maps(three.store(name))[1]) == blocks
    monkeypatch.delenv("KIT_STOP_AT")
    assert [contents(folder) for folder in extract.run(three)] == expected


def test_a_time_that_is_over_with_the_last_block_stops_nothing(job, monkeypatch):
    monkeypatch.setenv("KIT_STOP_AT", "1")
    assert len(extracted(job)) == 24


def test_features_do_not_depend_on_batch_or_block_size(job, monkeypatch):
    found = []
    for block, batch in ((512, 5), (4, 5), (7, 2), (24, 24)):
        monkeypatch.setattr(fill, "BLOCK", block)
        out = job.features.with_name(f"{block}")
        features = extracted(replace(job, batch=batch, features=out))
        found.append(np.array(features.vectors, np.float32))
        assert features.manifest["block"] == block
    for vectors in found[1:]:
        np.testing.assert_allclose(vectors, found[0], atol=1e-3)


def test_other_weights_replace_the_features(job, tmp_path, net):
    first = extracted(job)
    before = np.array(first.vectors)
    torch.manual_seed(5)
    nets.save(nets.build(net.config), tmp_path / "clean", SEEN)
    second = extracted(replace(job, runs=tmp_path))
    assert second.manifest["model"]["name"] == first.manifest["model"]["name"]
    assert second.manifest["model"]["hash"] != first.manifest["model"]["hash"]
    assert not np.allclose(second.vectors, before, atol=0.01)


@pytest.mark.parametrize(
    "views", [{"scales": (1.0, 0.5)}, {"size": 48}, {"flip": True}, {"normalise": True}]
)
def test_other_views_replace_the_features_and_the_same_ones_do_not(
    job, monkeypatch, views
):
    extract.run(job)
    assert (
        extracted(replace(job, views=Views(**views))).manifest.items()
        >= {
            name: list(value) if name == "scales" else value
            for name, value in views.items()
        }.items()
    )
    monkeypatch.setattr(nets, "load", lambda *_: pytest.fail("the network was loaded"))
    # a size that is named, and is the model's own
    again = replace(job, views=Views(**{"size": 64} | views))
    extract.run(again)


def test_finished_features_are_not_computed_again(three, monkeypatch):
    extract.run(three)
    monkeypatch.setattr(nets, "load", lambda *_: pytest.fail("the network was loaded"))
    extract.run(three)


def test_what_half_precision_cannot_hold_is_embedded_in_single(job, monkeypatch):
    expected = extracted(job).vectors.copy()
    embedded, tried = fill.embed, []

    def too_much(*given):
        tried.append(torch.is_autocast_enabled("cpu"))
        found = embedded(*given)
        return torch.full_like(found, torch.inf) if tried[-1] else found

    monkeypatch.setattr(nets, "half_precision", lambda _: torch.bfloat16)
    monkeypatch.setattr(fill, "embed", too_much)
    again = replace(job, features=job.features.with_name("again"))
    assert np.array_equal(extracted(again).vectors, expected)
    assert tried[:4] == [True, False] * 2
    monkeypatch.setattr(fill, "embed", lambda *given: embedded(*given) + torch.inf)
    never = replace(job, features=job.features.with_name("never"))
    with pytest.raises(FloatingPointError, match=r"is not finite, in single precision"):
        extract.run(never)


# What is known already

THERE = [1, 2, 7, 12, 13, 14, 15, 17, 18, 20]  # rows of `full`; all of block 3


def facts_of(job: Job, name: str) -> dict:
    about = nets.describe(job.runs / name)
    spec = config.from_dict(nets.NetConfig, about["config"]).input
    model = {"name": name, "hash": about["hash"]}
    return {
        "model": model,
        "list": {"name": "old", "hash": "0" * 64},
    } | job.views.facts(spec)


def remember(job: Job, name: str, ids, old: str = "old", seed: int = 0, **changed):
    """A store of vectors that no extraction gives, of `ids` and strangers; id -> vector."""
    dim = nets.describe(job.runs / name)["dim"]
    ids = np.array([*reversed(ids), f"{seed:016}", "f" * 16])
    vectors = np.random.default_rng(seed).normal(size=(len(ids), dim))
    folder = job.features / name / old
    store.create(folder, ids, dim, 64, facts_of(job, name) | changed)
    store.Writer(folder).write(0, vectors.astype(np.float16))
    store.finish(folder)
    return dict(zip(ids.tolist(), vectors.astype(np.float16), strict=True))


def ids_of(data: Path, rows=slice(None)) -> np.ndarray:
    return lists.load(data / "lists", "full").ids[rows]


@pytest.fixture
def knowing(three, data, tmp_path):
    """A job of two models that know some images, whose files are gone."""
    job = replace(three, models=("clean", "other/all"), known=("old",), data=tmp_path)
    for seed, name in enumerate(job.models):
        remember(job, name, ids_of(data, THERE), seed=seed)
    paths = lists.load(data / "lists", "full").rows["path"]
    for path in paths.drop(THERE):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        if (data / path).exists():
            (tmp_path / path).symlink_to(data / path)
    return job


def test_known_images_are_copied_to_the_bit_and_the_others_are_looked_at(
    knowing, data, small_blocks, undisturbed, monkeypatch
):
    read, real = [], images.decode

    def decode(content, name, *rest):
        read.append(name)
        return real(content, name, *rest)

    monkeypatch.setattr(images, "decode", decode)
    extract.run(knowing)
    ids, there = ids_of(data), np.isin(np.arange(24), THERE)
    paths = lists.load(data / "lists", "full").rows["path"]
    asked = [path for path in paths[~there] if path != "bad/gone.jpg"]
    assert sorted(read) == sorted(asked)  # once for both models
    for seed, name in enumerate(knowing.models):
        features = store.load(knowing.store(name))
        stored = remember(knowing, name, ids[THERE], "again", seed)
        expected = np.stack([stored[each] for each in ids[THERE]])
        assert features.vectors[there].tobytes() == expected.tobytes()
        whole = replace(knowing, models=(name,), known=(), data=data)
        (plain,) = undisturbed(whole)
        vectors = np.frombuffer(plain["vectors.npy"][128:], np.float16)
        vectors = vectors.reshape(24, -1)
        np.testing.assert_allclose(features.vectors[~there], vectors[~there], atol=2e-3)
        bad = paths.isin(BAD).to_numpy()
        assert features.manifest["unreadable"] == ids[bad].tolist()


def test_a_store_does_not_say_what_was_known(knowing, small_blocks, undisturbed, data):
    extract.run(knowing)
    plain = undisturbed(replace(knowing, known=(), data=data))
    for name, expected in zip(knowing.models, plain, strict=True):
        found = contents(knowing.store(name))
        assert found["vectors.npy"] != expected["vectors.npy"]
        for each in ("ids.npy", "done.npy"):
            assert found[each] == expected[each]
        one, other = (json.loads(each["manifest.json"]) for each in (found, expected))
        for about in (one, other):
            about.pop("seal")
            about["checksums"].pop("vectors.npy")
        assert one == other


def test_a_known_image_that_could_not_be_read_is_looked_at_again(job, data):
    remember(job, "clean", ids_of(data, [0, 3]))
    vectors, done = maps(job.features / "clean/old")
    row = store.load(job.features / "clean/old").locate(ids_of(data, [3]))
    vectors[row], done[:] = 0, store.WITH_ZEROS
    vectors.flush()
    done.flush()
    store.finish(job.features / "clean/old")
    features = extracted(replace(job, known=("old",)))
    plain = extracted(replace(job, features=job.features / "plain"))
    np.testing.assert_allclose(features.vectors[1:], plain.vectors[1:], atol=2e-3)
    assert not np.allclose(features.vectors[0], plain.vectors[0], atol=0.1)


def test_the_first_of_several_lists_counts_and_each_model_has_its_own(
    three, data, small_blocks
):
    ids = ids_of(data)
    job = replace(three, models=("clean", "c2x"), known=("old", "older"))
    rows = {"clean": ([0, 1, 2], [2, 5]), "c2x": ([1, 2, 8], [5])}
    seeds, known = iter(range(4)), {}
    for name, both in rows.items():
        older = [
            remember(job, name, ids[some], old, next(seeds))
            for old, some in zip(job.known, both, strict=True)
        ]
        known[name] = older[1] | older[0]
    extract.run(job)
    extract.run(replace(job, known=(), features=job.features / "plain"))
    for name, both in rows.items():
        features = store.load(job.store(name))
        plain = store.load(job.features / "plain" / name / "full")
        for row, image in enumerate(ids):
            if row in (*both[0], *both[1]):
                expected = known[name][image]
                assert features.vectors[row].tobytes() == expected.tobytes()
            else:
                np.testing.assert_allclose(
                    features.vectors[row], plain.vectors[row], atol=2e-3
                )


@pytest.mark.parametrize("template", ["own", "SS"])
def test_where_all_is_known_no_model_is_loaded_and_no_image_is_opened(
    job, data, tmp_path, monkeypatch, template
):
    job = replace(job, views=Views(template=template, size=64), known=("old",))
    rows = pd.read_csv(data / "sized/full.csv", dtype=str, keep_default_na=False)
    rows[["height", "width"]] = "-1"
    relisted(data / "sized", tmp_path / "lists", rows)
    stored = remember(job, "clean", ids_of(data))
    monkeypatch.setattr(nets, "load", lambda *_: pytest.fail("the network was loaded"))
    monkeypatch.setattr(fill, "DataLoader", lambda *_, **__: pytest.fail("a loader"))
    gone = replace(job, lists=tmp_path / "lists", data=tmp_path / "gone", workers=2)
    features = extracted(gone)
    expected = np.stack([stored[each] for each in features.ids])
    assert features.vectors.tobytes() == expected.tobytes()


@pytest.mark.parametrize("world", [2, 8])
def test_any_number_of_ranks_gives_the_same_bytes_with_what_is_known(
    knowing, small_blocks, monkeypatch, world
):
    expected = [contents(folder) for folder in extract.run(knowing)]
    for name in knowing.models:
        _, done = maps(knowing.store(name))
        done[:] = 0
        done.flush()
    assert as_ranks(knowing, monkeypatch, world) == [None] * world
    assert [contents(knowing.store(name)) for name in knowing.models] == expected


@pytest.mark.parametrize("blocks", [[0], [3], [1, 3, 5]])
def test_going_on_gives_the_same_bytes_with_what_is_known(
    knowing, small_blocks, blocks
):
    before = [contents(folder) for folder in extract.run(knowing)]
    for name in knowing.models[: len(blocks)]:
        vectors, done = maps(knowing.store(name))
        for block in blocks:
            vectors[block * 4 : block * 4 + 4] = np.nan
            done[block] = 0
        vectors.flush()
        done.flush()
        reopen(knowing.store(name))
    assert [contents(folder) for folder in extract.run(knowing)] == before


def test_the_log_counts_the_images_that_are_looked_at(knowing, caplog):
    caplog.set_level(logging.INFO)
    extract.run(knowing)
    assert "full: 10 of 24 images are known already" in caplog.text
    assert "full      14/14 images" in caplog.text


def test_a_block_of_known_images_that_is_left_is_work_that_is_left(
    knowing, small_blocks, monkeypatch
):
    extract.run(knowing)
    _, done = maps(knowing.folder)
    done[[2, 3]] = 0
    done.flush()
    monkeypatch.setenv("KIT_STOP_AT", "1")
    with pytest.raises(launch.Stopped, match="full: stopped after 4 of 8 images"):
        extract.run(knowing)
    extract.run(knowing)
    store.load(knowing.folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": {"name": "clean", "hash": "1" * 64}}, "model 111111111111, not "),
        ({"scales": [1.0, 0.5]}, "scales [1.0, 0.5], not [1.0]"),
        ({"size": 65}, "size 65, not 64"),
        ({"template": "SS"}, "template SS, not square"),
        ({"multiple": 32}, "multiple 32, not 16"),
        ({"least": 64}, "least 64, not 32"),
        ({"flip": True}, "flip True, not False"),
        ({"normalise": True}, "normalise True, not False"),
    ],
)
def test_known_features_of_other_weights_or_views_are_refused(job, data, changed, said):
    remember(job, "clean", ids_of(data, THERE), **changed)
    with pytest.raises(ValueError) as error:
        extract.run(replace(job, known=("old",)))
    assert f"clean/old: made with {said}" in str(error.value)
    assert not job.folder.exists()


def test_every_view_must_be_the_same(job, data):
    assert {*Views().facts(SPEC)} == {field.name for field in fields(Views)}


def test_the_same_weights_are_known_by_another_name_too(job, data):
    moved = {"name": "elsewhere", "hash": facts_of(job, "clean")["model"]["hash"]}
    stored = remember(job, "clean", ids_of(data, [0]), model=moved)
    features = extracted(replace(job, known=("old",)))
    assert features.vectors[0].tobytes() == stored[features.ids[0]].tobytes()


def test_known_features_that_are_missing_or_not_whole_are_refused(three, data):
    job = replace(three, known=("old",))
    for name in job.models[:2]:
        remember(job, name, ids_of(data, THERE))
    with pytest.raises(FileNotFoundError, match="no features in .*other/all/old;"):
        extract.run(job)
    manifest = job.features / "c2x/old/manifest.json"
    reopen(manifest.parent)
    with pytest.raises(ValueError, match="c2x/old: extraction has not finished"):
        extract.run(job)
    assert not job.folder.exists()


@pytest.mark.parametrize("name", ["full", "../old", "/old"])
def test_a_known_list_is_another_one_and_lies_beside(job, name):
    with pytest.raises(ValueError, match=f"known list '{name}' is not another one"):
        replace(job, known=(name,))


# Settling


def stopped(job: Job, monkeypatch, runs: int = 1) -> None:
    """So many blocks of the job done."""
    with monkeypatch.context() as patch:
        patch.setenv("KIT_STOP_AT", "1")
        for _ in range(runs):
            with pytest.raises(launch.Stopped):
                extract.run(job)


def test_when_the_time_is_over_what_is_there_can_be_used(
    three, data, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    stopped(three, monkeypatch, 2)
    for name in three.models:  # such as of a process that was killed while writing
        vectors, _ = maps(three.store(name))
        vectors[14:16] = 7
        vectors.flush()
    assert extract.settle(three) == 16
    ids, paths = ids_of(data), lists.load(data / "lists", "full").rows["path"]
    bad = paths[:8].isin(BAD).to_numpy()
    assert bad.any()
    for name, whole in zip(three.models, expected, strict=True):
        features = store.load(three.store(name))
        assert not features.vectors[8:].any()
        done = np.ascontiguousarray(features.vectors[:8]).tobytes()
        assert whole["vectors.npy"][128:].startswith(done)
        unreadable = [*ids[:8][bad], *ids[8:]]
        assert features.manifest["unreadable"] == unreadable


def test_a_settled_job_goes_on_and_ends_the_same(
    three, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    stopped(three, monkeypatch)
    assert extract.settle(three) == 20
    stopped(three, monkeypatch)
    for name in three.models:  # is open again
        with pytest.raises(ValueError, match="has not finished"):
            store.load(three.store(name))
    assert extract.settle(three) == 16
    assert [contents(folder) for folder in extract.run(three)] == expected
    assert extract.settle(three) == 0
    assert [contents(three.store(name)) for name in three.models] == expected


def test_an_image_that_one_model_lacks_is_lacking(three, small_blocks, monkeypatch):
    extract.run(three)
    for name, blocks in zip(three.models, ([], [2, 5], [0, 2]), strict=True):
        _, done = maps(three.store(name))
        done[blocks] = 0
        done.flush()
    assert extract.settle(three) == 12


def test_what_is_known_is_there_when_the_time_is_over(
    knowing, data, small_blocks, monkeypatch
):
    stopped(knowing, monkeypatch)
    lacking = [row for row in range(4, 24) if row not in THERE]
    assert extract.settle(knowing) == len(lacking)
    ids = ids_of(data)
    for seed, name in enumerate(knowing.models):
        features = store.load(knowing.store(name))
        stored = remember(knowing, name, ids[THERE], "again", seed)
        for row in THERE:
            assert features.vectors[row].tobytes() == stored[ids[row]].tobytes()
        assert features.manifest["unreadable"] == ids[lacking].tolist()
        assert maps(knowing.store(name))[1].clip(max=1).tolist() == [1, 0, 0, 0, 0, 0]


def test_what_one_model_knows_another_may_lack(three, data, small_blocks, monkeypatch):
    job = replace(three, models=("clean", "other/all"), known=("old",))
    for name, rows in zip(job.models, ([], THERE), strict=True):
        remember(job, name, ids_of(data, rows))
    stopped(job, monkeypatch)
    assert extract.settle(job) == 20


def test_nothing_at_all_is_not_settled(three, made, tmp_path, small_blocks):
    with pytest.raises(RuntimeError, match="clean/full: not one image's features are"):
        extract.settle(three)
    with pytest.raises(ValueError, match="has not finished"):
        store.load(three.folder)
    extract.run(three)
    torch.manual_seed(5)
    for name, net in made[1].items():  # what is there is of other weights
        nets.save(nets.build(net.config), tmp_path / name, SEEN)
    with pytest.raises(RuntimeError, match="clean/full: not one image's features are"):
        extract.settle(replace(three, runs=tmp_path))


def test_a_job_that_is_being_written_is_not_settled(job, monkeypatch):
    monkeypatch.setattr(files, "lock", partial(files.lock, patience=0.0))
    writing = pytest.raises(RuntimeError, match="another process is writing here")
    with files.lock(job.folder), writing:
        extract.settle(job)


# Ranks


def as_ranks(job, monkeypatch, world, slow=-1):
    """Runs the job as so many ranks, threads here: the slow one goes on when the others wait."""
    here, meeting, changed = (
        threading.local(),
        threading.Barrier(world),
        threading.Condition(),
    )
    arrived, given = [0] * world, [None] * world  # at how many meetings, and with what

    @contextmanager
    def group():
        yield launch.Rank(here.rank, world, here.rank, torch.device("cpu"))

    def arrive(count):
        with changed:
            arrived[here.rank] += count
            changed.notify_all()

    def all_reduce(tensor, group):
        assert group == "patient"
        arrive(1)
        given[here.rank] = tensor.clone()
        meeting.wait(60)
        total = torch.stack(given).sum(0)
        meeting.wait(60)
        tensor.copy_(total)
        if here.rank == slow:
            with changed:
                mine = arrived[slow]
                others = [n for n in range(world) if n != slow]
                ahead = changed.wait_for(
                    lambda: all(arrived[n] > mine for n in others), 60
                )
            assert ahead

    def run(number):
        here.rank = number
        try:
            extract.run(job)
        except launch.Stopped:
            raise
        except BaseException:
            meeting.abort()
            raise
        finally:
            arrive(1000)

    with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(launch, "group", group)
        patch.setattr(extract.dist, "new_group", lambda timeout: "patient")
        patch.setattr(extract.dist, "all_reduce", all_reduce)
        ran = [pool.submit(run, number) for number in range(world)]
        return [done.exception() for done in ran]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_slow_leaves_no_block_out(
    three, small_blocks, monkeypatch, undisturbed, slow
):
    expected = undisturbed(three)
    assert as_ranks(three, monkeypatch, 2, slow) == [None, None]
    assert [contents(three.store(name)) for name in three.models] == expected


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_gives_the_same_bytes(
    three, data, small_blocks, monkeypatch, undisturbed, world
):
    """8: two of them have nothing to do."""
    views = Views(template="SS", size=64, scales=(1.0, 0.5), multiple=32)
    models = ("clean", "c2x")
    job = replace(three, models=models, lists=data / "sized", views=views, batch=2)
    expected = undisturbed(job)
    assert as_ranks(job, monkeypatch, world) == [None] * world
    assert [contents(job.store(name)) for name in job.models] == expected


def test_ranks_that_went_on_after_fewer_ranks_were_stopped_give_the_same_bytes(
    three, small_blocks, monkeypatch, undisturbed
):
    expected = undisturbed(three)
    monkeypatch.setenv("KIT_STOP_AT", "1")
    stopped = as_ranks(three, monkeypatch, 2)
    assert [str(error) for error in stopped] == 2 * [
        "full: stopped after 8 of 24 images, the time is over; run it again to go on"
    ]
    monkeypatch.delenv("KIT_STOP_AT")
    assert maps(three.folder)[1].clip(max=1).tolist() == [1, 1, 0, 0, 0, 0]
    assert as_ranks(three, monkeypatch, 3) == [None] * 3
    assert [contents(three.store(name)) for name in three.models] == expected


def test_ranks_stop_together_even_those_that_have_finished(
    job, small_blocks, monkeypatch
):
    main = {0: math.inf, 1: 0.0}
    names: dict[int, int] = {}

    def time_left():
        return main[names[threading.get_ident()]]

    real = fill.fill

    def told(data, listed, models, rank, *rest):
        names[threading.get_ident()] = rank.rank
        return real(data, listed, models, rank, *rest)

    monkeypatch.setattr(launch, "time_left", time_left)
    monkeypatch.setattr(fill, "fill", told)
    stopped = as_ranks(job, monkeypatch, 2)
    assert [type(error) for error in stopped] == [launch.Stopped] * 2
    assert maps(job.folder)[1].clip(max=1).tolist() == [1, 1, 1, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_bytes_of_one(three, data, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = pd.read_csv(data / "sized/full.csv", dtype=str, keep_default_na=False)
    many = pd.concat([rows] * 55, ignore_index=True)  # three blocks
    many["id"] = [f"{number:016x}" for number in range(len(many))]
    relisted(data / "sized", tmp_path / "lists", many)
    views = Views(template="SS", size=64)
    models, where = ("clean", "c2x"), tmp_path / "lists"
    job = replace(three, models=models, lists=where, views=views, batch=32)
    expected = extract.run(replace(job, features=tmp_path / "alone"))
    assert maps(expected[0])[1].clip(max=1).tolist() == [1, 1, 1]
    logs = tmp_path / "logs"
    module, path = "kit.features.extract", str(job.write())
    launch.launch(module, [path], processes=processes, logs=logs)
    for name, theirs in zip(job.models, expected, strict=True):
        assert contents(job.store(name)) == contents(theirs)


# Jobs and refusals


def test_a_job_survives_its_file(three):
    views = Views(320, "L2", (0.7, 1.0), 32, 128, True, True)
    job = replace(three, views=views, batch=3, known=("old", "older"))
    path = job.write()
    assert path == job.features / "clean/full/job.json" == job.folder / "job.json"
    assert config.read(Job, path) == job
    assert json.loads(path.read_text())["features"] == str(job.features)


def test_main_runs_the_job_of_a_file_and_tells_how_far_it_is(job, caplog):
    caplog.set_level(logging.INFO)
    extract.main([str(job.write())])
    assert len(store.load(job.folder)) == 24
    assert "full      24/24 images" in caplog.text
    assert "waiting for data  0:00:00 left" in caplog.text
    assert "clean, full: 3 images cannot be read" in caplog.text


def test_the_log_tells_speed_waiting_and_the_time_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cpu = torch.device("cpu")
    pace = fill._Pace("index", 40_000, launch.Rank(0, 8, 0, cpu))

    def loaded():
        for batch in range(3):
            now[0] += 3
            yield batch

    batches = loaded()
    for batch in range(3):
        assert pace.wait(batches) == batch
        now[0] += 1
        pace.tell(100)
    line = "index     300/40000 images in each of 8    25.0 images/s  75 % waiting for data"
    assert caplog.messages == [f"{line}  0:26:28 left"]
    other = fill._Pace("index", 1, launch.Rank(1, 8, 1, cpu))
    other.tell(1)
    assert len(caplog.messages) == 1


def test_too_many_unreadable_images_are_refused_for_all_models_and_read_again(
    three, small_blocks, undisturbed
):
    expected = undisturbed(three)
    job = replace(three, max_unreadable=0.1)
    with pytest.raises(ValueError, match="list full: 3 of 24 images cannot be read"):
        extract.run(job)
    for name in job.models:
        assert maps(job.store(name))[1].clip(max=1).tolist() == [1, 0, 1, 1, 1, 0]
        with pytest.raises(ValueError, match="has not finished"):
            store.load(job.store(name))
    assert [contents(folder) for folder in extract.run(three)] == expected


def test_a_folder_that_the_list_s_paths_do_not_start_from_is_refused(three, data):
    wrong = replace(three, data=data / "photos")
    with pytest.raises(FileNotFoundError, match=r"photos/00\.jpg is not there"):
        extract.run(wrong)
    assert not three.features.exists()


def test_a_missing_list_or_model_is_refused_and_leaves_nothing(three):
    with pytest.raises(FileNotFoundError, match="no list nothing in .*00_image_lists"):
        extract.run(replace(three, images="nothing"))
    with pytest.raises(FileNotFoundError, match="no model in .*02_train_stage"):
        extract.run(replace(three, models=("clean", "nothing")))
    assert not three.features.exists()


def test_weights_that_give_no_number_are_named_with_the_image(job, net, tmp_path):
    broken = nets.build(net.config)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    nets.save(broken, tmp_path / "broken", SEEN)
    with pytest.raises(FloatingPointError, match=r"broken: the embedding of photos/00"):
        extract.run(replace(job, runs=tmp_path, models=("broken",)))


def test_a_single_value_that_is_none_is_refused_too(job, made, tmp_path, small_blocks):
    broken = nets.build(made[1]["c2x"].config)
    with torch.no_grad():
        broken.neck[1].bias[3] = math.inf  # the others come out as 0
    nets.save(broken, tmp_path / "broken", SEEN)
    job = replace(job, runs=tmp_path, models=("broken",))
    with pytest.raises(FloatingPointError, match=r"broken: the embedding of photos/00"):
        extract.run(job)
    maps(job.folder)[1][0] = 1  # goes on with the second block
    with pytest.raises(FloatingPointError, match=r"broken: the embedding of photos/04"):
        extract.run(job)


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
