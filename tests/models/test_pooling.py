from itertools import pairwise

import numpy as np
import pytest
import torch

from kit.models.pooling import GeM, gem


def by_hand(x, p, eps=1e-6):
    """Generalised mean of every channel's plane, one number after another, in float64."""
    pooled = np.empty(x.shape[:2])
    for image, channel in np.ndindex(pooled.shape):
        numbers = [max(float(v), eps) for v in x[image, channel].ravel()]
        pooled[image, channel] = (sum(v**p for v in numbers) / len(numbers)) ** (1 / p)
    return pooled


@pytest.fixture
def maps():
    """Activations as they are after a ReLU6, some of them below zero nevertheless."""
    return 4 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 6.0])
def test_gem_matches_its_definition(maps, p):
    expected = torch.from_numpy(by_hand(maps.numpy(), p)).float()
    torch.testing.assert_close(gem(maps, p), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(GeM(p)(maps), expected, rtol=1e-5, atol=1e-6)


def test_gem_of_power_1_is_the_mean_of_what_is_above_zero(maps):
    expected = maps.clamp(min=0).mean(dim=(2, 3))
    torch.testing.assert_close(gem(maps, 1.0), expected, rtol=1e-5, atol=2e-6)


def test_gem_grows_with_its_power_towards_the_maximum(maps):
    maps = maps.abs() / 5  # 40th powers of 10 would leave float32's range
    pooled = [gem(maps, p) for p in (1.0, 2.0, 3.0, 8.0, 40.0)]
    assert all((low < high).all() for low, high in pairwise(pooled))
    largest = maps.amax(dim=(2, 3))
    assert (pooled[-1] <= largest * (1 + 1e-5)).all()
    assert (pooled[-1] >= largest * (1 / 20) ** (1 / 40) * (1 - 1e-5)).all()


def test_gem_does_not_depend_on_where_things_are(maps):
    torch.testing.assert_close(gem(maps), gem(maps.flip(-1).transpose(2, 3)))
    shuffled = maps.flatten(2)[..., torch.randperm(20)].reshape(2, 3, 2, 10)
    torch.testing.assert_close(gem(maps), gem(shuffled))


def test_gem_leaves_its_input_as_it_was(maps):
    before = maps.clone()
    gem(maps)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32_under_autocast_too(maps, dtype):
    half = (60 * maps).to(dtype)  # cubes of 240 leave float16's range of 65504
    with torch.autocast("cpu", torch.bfloat16):
        pooled = GeM()(half)
    assert pooled.dtype == torch.float32
    expected = torch.from_numpy(by_hand(half.float().numpy(), 3.0)).float()
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)


def test_the_power_is_frozen_unless_it_is_asked_for(maps):
    frozen, trained = GeM(3.0), GeM(3.0, trainable=True)
    assert [p.requires_grad for p in frozen.parameters()] == [False]
    assert [p.requires_grad for p in trained.parameters()] == [True]
    assert frozen.state_dict().keys() == trained.state_dict().keys() == {"p"}
    assert not frozen(maps).requires_grad


def test_gradients_of_input_and_power_are_those_of_the_definition(maps):
    x = maps.clone().requires_grad_()
    pool = GeM(3.0, trainable=True)
    pool(x).sum().backward()

    step = 1e-5
    low, high = (by_hand(maps.numpy(), 3.0 + s).sum() for s in (-step, step))
    assert pool.p.grad.item() == pytest.approx((high - low) / (2 * step), rel=1e-4)
    for place in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 3, 4), (1, 0, 1, 1)]:
        near = [maps.numpy().astype(np.float64) for _ in range(2)]
        near[0][place] -= step
        near[1][place] += step
        low, high = (by_hand(values, 3.0).sum() for values in near)
        slope = (high - low) / (2 * step)
        assert x.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_a_plane_of_zeros_has_finite_gradients():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pool = GeM(3.0, trainable=True)
    pool(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(pool.p.grad)
