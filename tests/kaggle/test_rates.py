import time

import numpy as np
import pytest
import torch
from PIL import Image

from kit.data.inputs import InputSpec
from kit.features.views import Views
from kit.kaggle import rates
from kit.models.net import EmbeddingNet, NetConfig


def small(size=64):
    return NetConfig("resnet18", neck="none", input=InputSpec(size=size))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    return tmp_path, np.array([f"{number}.jpg" for number in range(5)])


class Slow(EmbeddingNet):
    """0.1 s a batch more than it takes."""

    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)


def test_the_measurement_has_every_model_at_every_scale(photos):
    nets = {"plain": EmbeddingNet(small(32)).eval(), "slow": Slow(small(48)).eval()}
    how = Views(scales=(1.0, 1.5), least=32)
    options = {"device": torch.device("cpu"), "seconds": 0.5, "batch": 4, "workers": 0}
    found = rates.measure(nets, how, *photos, **options)
    assert found.decode > 0
    assert {name: list(costs) for name, costs in found.seconds.items()} == {
        "plain": [1.0, 1.5],
        "slow": [1.0, 1.5],
    }
    assert min(found.seconds["slow"].values()) >= 0.1 / 4
    assert min(found.seconds["plain"].values()) > 0
    halved = rates.measure(nets, how, *photos, **options, gpus=2)
    assert min(halved.seconds["slow"].values()) >= 0.1 / 4 / 2


def test_the_loaders_rate_counts_images_and_all_views(photos, monkeypatch):
    class Sleeps(rates.EvalImages):
        def __getitem__(self, row):
            time.sleep(0.02)
            return super().__getitem__(row)

    monkeypatch.setattr(rates, "EvalImages", Sleeps)
    views = Views(scales=(1.0, 1.5)).each(InputSpec(size=32))
    speed, pictures = rates._loader(*photos, views, 0.3, batch=4, workers=0)
    assert 0 < speed <= 1 / 0.02
    assert [tuple(x.shape) for x in pictures] == [(4, 3, 32, 32), (4, 3, 48, 48)]


def test_a_template_is_not_measured(photos):
    nets = {"a": EmbeddingNet(small(32)).eval()}
    with pytest.raises(ValueError, match="template L2 is not measured"):
        rates.measure(nets, Views(template="L2"), *photos, device=torch.device("cpu"))
