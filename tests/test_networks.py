"""The networks of both systems at work: two steps of training, then features, on real photos."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit import files
from kit.data import lists, sources, tables
from kit.data.inputs import InputSpec
from kit.features import extract, store
from kit.models.net import NetConfig
from kit.training import checkpoints, stage
from kit.training.job import Job, Stage
from kit.training.optim import Optim

NETWORKS = {
    "resnet50": NetConfig("resnet50", stride=16),
    "seresnet101_ibn_a": NetConfig("seresnet101_ibn_a", stride=16),
    "resnest101e": NetConfig("resnest101e", stride=16),
    "resnext101_ibn_a": NetConfig("resnext101_ibn_a", stride=16),
    "fishnet150": NetConfig("fishnet150", pool="G,G,G,G", neck_bias=True),
}
SIDE = 96


@pytest.fixture(scope="module")
def few(photos, continents, tmp_path_factory) -> Path:
    """Lists of four training images and two queries of the packages photos."""
    folder = tmp_path_factory.mktemp("few")
    data = photos / "packages"
    where = tables.read_continents(continents)
    lists.build(sources.official(data), data, folder, where, sizes=False)
    for name, count in (("clean", 4), ("query", 2)):
        table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
        table.head(count).to_csv(
            folder / f"{name}.csv", index=False, lineterminator="\n"
        )
        about = files.read_json(folder / f"{name}.json")
        lists.describe_file(folder / f"{name}.csv", about)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_two_steps_and_exports_features(photos, few, tmp_path, name):
    data = photos / "packages"
    plan = Stage("clean", "clean", size=SIDE, epochs=1, batch=2, optim=Optim(1e-3))
    job = Job(plan, NETWORKS[name], few, data, tmp_path, workers=0, log_every=1)
    folder = stage.run(job)
    losses = checkpoints.read_log(folder)["loss"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    about = json.loads((folder / "model.json").read_text())
    assert about["config"]["backbone"] == name and about["dim"] == 512
    where = few, "query", data, tmp_path / "features"
    looks = extract.Job(tmp_path, ("clean",), *where, batch=2, workers=0)
    (out,) = extract.run(looks)
    vectors = store.load(out).vectors.astype(np.float32)
    assert vectors.shape == (2, 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    assert InputSpec(SIDE) == job.kept.input
