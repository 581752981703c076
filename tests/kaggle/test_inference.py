import shutil
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kit import launch
from kit.answers.retrieval import Scenes
from kit.data import lists, sources
from kit.data.inputs import InputSpec
from kit.features import fill, store
from kit.features.views import Views
from kit.kaggle import inference, rates
from kit.kaggle.entry import Entry
from kit.models import net as nets
from kit.plan import Run
from kit.rerank.chain import Chain

VIEWS = Views(scales=(0.5, 1.0))
CHAIN = Chain({"light": 0.5, "heavy": 1.0})  # the last of the models goes first


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 5 queries and 9 index images with two small networks."""
    for folder, count in (("test", 5), ("index", 9)):
        for number in range(count):
            name = f"{folder[0].encode().hex()}{number:014x}"
            path = tmp_path.joinpath("data", folder, *name[:3], f"{name}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3))
            cv2.imwrite(str(path), pixels.astype(np.uint8))
    place = Run("toy", tmp_path / "data", tmp_path / "work")
    lists.build(sources.competition(place.data), place.data, place.lists, sizes=False)
    for seed, name in enumerate(CHAIN.models):
        torch.manual_seed(seed)
        spec = InputSpec(size=32)
        net = nets.build(nets.NetConfig("test_resnet", dim=8, input=spec))
        nets.save(net, place.runs / name, seen={})
    monkeypatch.setenv(launch.STOP_AT, "")
    asked = lists.load(place.lists, "query").ids
    return Entry(place, tmp_path / "submission.csv", asked, ends=time.time() + 3600)


def measured(monkeypatch, seconds):
    """A machine on which an image costs so much: model, scale -> seconds."""
    # how slow a machine is cannot be chosen, but what was measured of it can
    found = rates.Rates(1e6, seconds)
    monkeypatch.setattr(inference, "_look", lambda *_: found)


def scales_of(run, model, images="index"):
    return store.load(run.place.features / model / images).manifest["scales"]


def test_with_time_enough_all_models_look_at_all_scales(run, capsys):
    chain, views = inference.extracted(run, CHAIN, VIEWS)
    assert (chain, views) == (CHAIN, VIEWS)
    for model in CHAIN.models:
        assert scales_of(run, model, "query") == scales_of(run, model) == [0.5, 1.0]
    assert (
        "all of it fits: heavy, light at scales 0.5, 1 takes" in capsys.readouterr().out
    )


def test_scales_go_before_models_and_the_chain_keeps_its_weights(
    run, monkeypatch, capsys
):
    each = {0.5: 100.0, 1.0: 100.0}  # 14 images: 5,600 s with all, 2,800 at one scale
    measured(monkeypatch, {"heavy": each, "light": each})
    chain, views = inference.extracted(run, CHAIN, VIEWS)
    assert chain == CHAIN
    assert views == replace(VIEWS, scales=(1.0,))
    assert scales_of(run, "light") == scales_of(run, "heavy") == [1.0]
    assert "without scale 0.5 it takes" in capsys.readouterr().out


def test_the_model_of_least_weight_goes_first(run, monkeypatch):
    each = {
        0.5: 100.0,
        1.0: 200.0,
    }  # 5,600 s with both at scale 1, 4,200 with one at all
    measured(monkeypatch, {"heavy": each, "light": each})
    chain, views = inference.extracted(run, CHAIN, VIEWS)
    assert dict(chain.models) == {"heavy": 1.0}
    assert views.scales == (1.0,)
    assert not (run.place.features / "light").exists()
    query, index = (lists.load(run.place.lists, name) for name in ("query", "index"))
    _, ranked = Scenes(run.place.features, query, index).answers(chain)
    assert ranked.shape == (5, 9) and (ranked != "").all()


def test_images_that_there_was_no_time_for_count_as_unreadable(
    run, monkeypatch, capsys
):
    monkeypatch.setattr(fill, "BLOCK", 4)
    monkeypatch.setattr(inference, "_after", lambda *_: [7200.0] * 2)  # no time is left
    inference.extracted(run, CHAIN, VIEWS)
    told = capsys.readouterr().out
    assert "nothing fits: even heavy at scale 1" in told
    assert "query: the time is over, without 1 images" in told
    assert "index: the time is over, without 5 images" in told
    found = store.load(run.place.features / "heavy" / "index")
    assert found.readable().sum() == 4


def test_features_that_travelled_keep_their_scales(run, monkeypatch):
    inference.extracted(run, CHAIN, VIEWS)
    for model in CHAIN.models:
        (run.place.features / model / "index").rename(
            run.place.features / model / "known"
        )
    each = {0.5: 400.0, 1.0: 400.0}  # 5 queries: 8,000 s with all, 4,000 with a model
    measured(monkeypatch, {"heavy": each, "light": each})
    chain, views = inference.extracted(run, CHAIN, VIEWS, known="known")
    assert views == VIEWS
    assert dict(chain.models) == {"heavy": 1.0}


def test_where_all_features_travelled_no_image_is_looked_at(run, capsys):
    inference.extracted(run, CHAIN, VIEWS)
    expected = {}
    for model in CHAIN.models:
        stores = [
            store.load(run.place.features / model / name) for name in ("query", "index")
        ]
        both = run.place.features / model / "known"
        about = {name: stores[0].manifest[name] for name in ("model", "list", "seen")}
        about |= VIEWS.facts(InputSpec(size=32))
        ids = np.concatenate([each.ids for each in stores])
        vectors = np.concatenate([each.vectors for each in stores])
        store.create(both, ids, 8, len(ids), about)
        store.Writer(both).write(0, vectors)
        store.finish(both)
        expected[model] = np.array(stores[1].vectors)
        for name in ("query", "index"):
            shutil.rmtree(run.place.features / model / name)
    shutil.rmtree(run.place.data)
    assert inference.extracted(run, CHAIN, VIEWS, known="known") == (CHAIN, VIEWS)
    assert "all is known" in capsys.readouterr().out
    for model, vectors in expected.items():
        found = store.load(run.place.features / model / "index").vectors
        assert np.array_equal(found, vectors)


def test_time_is_kept_for_what_comes_after(run, monkeypatch):
    inference.extracted(run, CHAIN, VIEWS)
    stop = launch.time_left()
    assert stop < run.ends - time.time()
