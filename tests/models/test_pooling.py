import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kit.models import pooling
from kit.models.pooling import (
    GeM,
    RegionalGeM,
    gem,
    mac,
    regional_gem,
    regions,
    rmac,
    spoc,
)

EVERY = "GCSMRL"


def by_hand(x, p, eps=1e-6):
    """Generalised mean of every channel's plane, one number after another, in float64.

    p: one power, or one per channel.
    """
    pooled = np.empty(x.shape[:2])
    powers = np.broadcast_to(p, x.shape[1])
    for image, channel in np.ndindex(pooled.shape):
        power = float(powers[channel])
        numbers = [max(float(v), eps) for v in x[image, channel].ravel()]
        pooled[image, channel] = (sum(v**power for v in numbers) / len(numbers)) ** (
            1 / power
        )
    return pooled


@pytest.fixture
def maps():
    """Activations as they are after a ReLU6, some of them below zero nevertheless."""
    return 4 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def close(result, expected, rtol=1e-5, atol=1e-6):
    expected = torch.as_tensor(np.asarray(expected)).float()
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


# GeM


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 6.0])
def test_gem_matches_its_definition(maps, p):
    close(gem(maps, p), by_hand(maps.numpy(), p))
    close(GeM(p)(maps), by_hand(maps.numpy(), p))


def test_gem_of_power_1_is_the_mean_of_what_is_above_zero(maps):
    expected = maps.clamp(min=0).mean(dim=(2, 3))
    torch.testing.assert_close(gem(maps, 1.0), expected, rtol=1e-5, atol=2e-6)


def test_gem_grows_with_its_power_towards_the_maximum(maps):
    pooled = [gem(maps.abs(), p) for p in (1.0, 2.0, 3.0, 8.0, 40.0)]
    assert all((low < high).all() for low, high in pairwise(pooled))
    largest = maps.abs().amax(dim=(2, 3))
    assert (pooled[-1] <= largest * (1 + 1e-5)).all()
    assert (pooled[-1] >= largest * (1 / 20) ** (1 / 40) * (1 - 1e-5)).all()


def test_gem_per_channel_raises_every_channel_to_its_own_power(maps):
    powers = [1.5, 3.0, 6.5]
    close(gem(maps, torch.tensor(powers)), by_hand(maps.numpy(), powers))
    pool = GeM(2.0, channels=3)
    assert pool.p.shape == (3,)
    close(pool(maps), by_hand(maps.numpy(), 2.0))


def test_the_power_is_frozen_unless_it_is_asked_for(maps):
    frozen, trained = GeM(3.0), GeM(3.0, trainable=True)
    assert [p.requires_grad for p in frozen.parameters()] == [False]
    assert [p.requires_grad for p in trained.parameters()] == [True]
    assert frozen.state_dict().keys() == trained.state_dict().keys() == {"p"}
    assert not frozen(maps).requires_grad


@pytest.mark.parametrize("channels", [0, 3], ids=["one", "per channel"])
def test_gradients_of_input_and_power_are_those_of_the_definition(maps, channels):
    x = maps.clone().requires_grad_()
    pool = GeM(3.0, trainable=True, channels=channels)
    pool(x).sum().backward()

    step = 1e-5
    for place in np.ndindex(*pool.p.shape):  # once, at (), where there is one power
        low, high = (np.full(pool.p.shape, 3.0) for _ in range(2))
        low[place] -= step
        high[place] += step
        low, high = (by_hand(maps.numpy(), p).sum() for p in (low, high))
        slope = (high - low) / (2 * step)
        assert pool.p.grad[place].item() == pytest.approx(slope, rel=1e-4)
    for place in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 3, 4), (1, 0, 1, 1)]:
        near = [maps.numpy().astype(np.float64) for _ in range(2)]
        near[0][place] -= step
        near[1][place] += step
        low, high = (by_hand(values, 3.0).sum() for values in near)
        slope = (high - low) / (2 * step)
        assert x.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("p", [3.0, 12.0])
def test_a_plane_of_zeros_has_finite_gradients(p):
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pool = GeM(p, trainable=True)
    pool(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(pool.p.grad)


# MAC, SPoC


def test_mac_is_the_maximum_and_spoc_the_mean_of_every_plane(maps):
    planes = maps.numpy().reshape(2, 3, 20)
    close(mac(maps), [[max(plane) for plane in image] for image in planes])
    close(spoc(maps), [[sum(plane) / 20 for plane in image] for image in planes])


# R-MAC


def unit(vector):
    return vector / math.sqrt(sum(v * v for v in vector))


def rmac_by_hand(image, squares):
    """Sum of the unit maxima of some squares of a (C, H, W) map, of unit length."""
    total = np.zeros(len(image))
    for top, left, side in squares:
        cut = image[:, top : top + side, left : left + side]
        total += unit(np.array([plane.max() for plane in cut]))
    return unit(total)


def test_the_regions_of_a_square_map_are_1_4_and_9(maps):
    expected = [(0, 0, 12)]
    expected += [(top, left, 8) for top in (0, 4) for left in (0, 4)]
    expected += [(top, left, 6) for top in (0, 3, 6) for left in (0, 3, 6)]
    assert regions(12, 12) == expected
    assert regions(12, 12, levels=1) == expected[:1]
    # squares of side 2 on 5: the middle one's 1.5 is cut
    assert [top for top, left, _ in regions(5, 5)[5:] if not left] == [0, 1, 3]


def test_the_regions_of_a_long_map_overlap_by_close_to_40_percent():
    # side 10: two regions 10 apart do not overlap, 3 at 5 by 50 %, 4 by 67 %
    assert regions(10, 20, levels=1) == [(0, 0, 10), (0, 5, 10), (0, 10, 10)]
    # side 10 on 16: 2 regions overlap by exactly 40 %
    assert regions(16, 10, levels=1) == [(0, 0, 10), (6, 0, 10)]
    # side 20 on 35: 2 regions overlap by 25 %, 3 by 62 %
    assert regions(20, 35, levels=1) == [(0, 0, 20), (0, 15, 20)]
    # side 20 on 37: 2 regions overlap by 15 %, 3 by 57 %; the middle one's 8.5 is cut
    assert regions(37, 20, levels=1) == [(0, 0, 20), (8, 0, 20), (17, 0, 20)]
    # at level 2 one more on the long side, at level 3 too: (l + 1) x l squares
    assert [side for *_, side in regions(16, 10)] == [10] * 2 + [6] * 6 + [5] * 12
    assert {top for top, _, side in regions(16, 10) if side == 6} == {0, 5, 10}
    assert {left for _, left, side in regions(16, 10) if side == 6} == {0, 4}


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 3), (7, 7), (13, 40)])
def test_regions_lie_in_the_map_and_turn_with_it(height, width):
    squares = regions(height, width)
    for top, left, side in squares:
        assert side >= 1 and top >= 0 and left >= 0
        assert top + side <= height and left + side <= width
    turned = sorted((left, top, side) for top, left, side in regions(width, height))
    assert turned == sorted(squares)
    assert max(left + side for _, left, side in squares) == width
    assert max(top + side for top, _, side in squares) == height


@pytest.mark.parametrize("shape", [(12, 12), (16, 10), (3, 4)])
def test_rmac_matches_its_definition(shape):
    x = torch.rand(2, 5, *shape, generator=torch.Generator().manual_seed(3))
    expected = [rmac_by_hand(image, regions(*shape)) for image in x.numpy()]
    close(rmac(x), expected)
    assert not torch.allclose(rmac(x), rmac(x, levels=1), atol=1e-4)


def test_rmac_of_a_map_with_one_region_is_its_unit_maximum(maps):
    close(rmac(maps[..., :4], levels=1), [unit(v) for v in mac(maps[..., :4]).numpy()])


# Regional GeM


def regional_by_hand(x, p, region_p, side):
    """Half the map, half the GeM of what lies within side // 2, mirrored at the borders."""
    height, width = x.shape[2:]
    mixed = np.empty(x.shape)
    x = np.maximum(x.astype(np.float64), 1e-6)

    def mirrored(i, length):
        return abs(i) if i < length else 2 * (length - 1) - i

    for image, channel, row, column in np.ndindex(x.shape):
        reach = [min(side // 2, length - 1) for length in (height, width)]
        near = [
            x[image, channel, mirrored(row + i, height), mirrored(column + j, width)]
            for i in range(-reach[0], reach[0] + 1)
            for j in range(-reach[1], reach[1] + 1)
        ]
        mean = sum(v**region_p for v in near) / len(near)
        mixed[image, channel, row, column] = (
            x[image, channel, row, column] + mean ** (1 / region_p)
        ) / 2
    return by_hand(mixed, p)


@pytest.mark.parametrize("shape", [(6, 5), (4, 9), (2, 3), (1, 1)])
def test_regional_gem_matches_its_definition(shape):
    x = 3 * torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(3))
    close(regional_gem(x, 3.0), regional_by_hand(x.numpy(), 3.0, 2.5, 5))
    close(RegionalGeM(2.0)(x), regional_by_hand(x.numpy(), 2.0, 2.5, 5))
    close(regional_gem(x, 4.0, 1.5, 3), regional_by_hand(x.numpy(), 4.0, 1.5, 3))


def test_the_power_of_regional_gem_has_the_gradient_of_the_definition(maps):
    pool = RegionalGeM(3.0, trainable=True)
    pool(maps).sum().backward()
    low, high = (
        regional_by_hand(maps.numpy(), 3.0 + step, 2.5, 5).sum()
        for step in (-1e-5, 1e-5)
    )
    assert pool.p.grad.item() == pytest.approx((high - low) / 2e-5, rel=1e-4)


# What holds for all of them


def pools(channels=3):
    """One layer for every letter."""
    return {letter: pooling.create(letter, [channels], 2.5) for letter in EVERY}


@pytest.mark.parametrize("letter", EVERY)
def test_a_constant_map_is_pooled_to_its_constants(letter):
    constants = torch.tensor([[0.5, 2.0, 7.0]])
    x = constants[..., None, None].expand(1, 3, 4, 6)
    expected = unit(constants[0].numpy())[None] if letter == "R" else constants
    close(pools()[letter]([x]), expected)


@pytest.mark.parametrize("letter", "GCSM")
def test_a_pool_does_not_depend_on_where_things_are(maps, letter):
    pool = pools()[letter]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = maps.flatten(2)[..., order].reshape(2, 3, 2, 10)
    torch.testing.assert_close(pool([maps]), pool([shuffled]))


@pytest.mark.parametrize("letter", EVERY)
def test_a_pool_does_not_depend_on_left_and_right_nor_on_up_and_down(letter):
    # 12 x 12: every square of R-MAC has its mirror image among them
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    pool = pools()[letter]
    torch.testing.assert_close(pool([x]), pool([x.flip(-1)]))
    torch.testing.assert_close(pool([x]), pool([x.flip(-2)]))
    torch.testing.assert_close(pool([x]), pool([x.transpose(2, 3)]))


@pytest.mark.parametrize("letter", EVERY)
def test_a_pool_scales_with_its_map(letter):
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) + 0.01
    pool = pools()[letter]
    expected = pool([x]) * (1 if letter == "R" else 50)
    torch.testing.assert_close(pool([50 * x]), expected)


@pytest.mark.parametrize("letter", EVERY)
def test_every_image_and_memory_format_is_pooled_alike(maps, letter):
    pool = pools()[letter]
    before = maps.clone()
    whole = pool([maps])
    assert torch.equal(maps, before)
    torch.testing.assert_close(
        torch.cat([pool([image[None]]) for image in maps]), whole
    )
    torch.testing.assert_close(
        pool([maps.to(memory_format=torch.channels_last)]), whole
    )


@pytest.mark.parametrize("letter", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32_under_autocast_too(maps, letter, dtype):
    half = (60 * maps).to(dtype)  # cubes of 240 leave float16's range of 65504
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pools()[letter]([half])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pools()[letter]([half.float()]))


# Strings


def test_fishnet_s_strings_give_the_lengths_of_the_paper_s_competition_entry():
    channels = [320, 832, 1600, 2112]
    assert pooling.create("G,G,G,G", channels).dim == 4864
    assert pooling.create("SMG,MG,G,G", channels).dim == 6336


def test_a_string_names_what_stands_side_by_side(maps):
    later = torch.rand(2, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    pool = pooling.create("SMR,GL", [3, 4], 2.5)
    expected = [spoc(maps), mac(maps), rmac(maps), gem(later, 2.5)]
    expected.append(regional_gem(later, 2.5))
    pooled = pool([maps, later])
    assert torch.equal(pooled, torch.cat(expected, dim=1))
    assert pooled.shape == (2, pool.dim)


def test_the_powers_of_a_string_are_parameters_named_p():
    def powers(trainable):
        pool = pooling.create("GS,CL", [3, 4], 2.5, trainable)
        return {name: p for name, p in pool.named_parameters() if p.requires_grad}

    assert powers(False) == {}
    assert all(name.rpartition(".")[2] == "p" for name in powers(True))
    assert [tuple(p.shape) for p in powers(True).values()] == [(), (4,), ()]
    assert all((p == 2.5).all() for p in powers(True).values())


def test_a_string_says_how_many_stages_it_pools():
    assert [pooling.stages(s) for s in ("G", "SMG,MG,G,G", "dolg")] == [1, 4, 2]


@pytest.mark.parametrize("spec", ["X", "G,GX", "g", "G, G", "dolg,G"])
def test_an_unknown_letter_is_refused_with_the_letters_there_are(spec):
    listed = r"G \(GeM\), C \(GeM with a power per channel\), S \(SPoC\), M \(MAC\)"
    listed += r", R \(R-MAC\), L \(regional GeM\); or take 'dolg'"
    letter = next(letter for letter in spec.replace(",", "") if letter not in EVERY)
    message = f"^pool '{spec}': '{letter}' is not one of {listed}$"
    with pytest.raises(ValueError, match=message):
        pooling.stages(spec)


@pytest.mark.parametrize("spec, entry", [("", 1), ("G,", 2), (",G", 1), ("G,,G", 2)])
def test_an_entry_without_a_letter_is_refused(spec, entry):
    with pytest.raises(ValueError, match=f"^pool '{spec}': entry {entry} has no"):
        pooling.stages(spec)


def test_a_string_for_other_maps_is_refused():
    with pytest.raises(ValueError, match="^pool 'G,G' takes 2 feature maps, not 1$"):
        pooling.create("G,G", [8])
    with pytest.raises(ValueError, match="^pool 'dolg' takes 2 feature maps, not 3$"):
        pooling.create("dolg", [8, 8, 8])
    with pytest.raises(ValueError):
        pooling.create("G,G", [3, 3])([torch.rand(1, 3, 2, 2)])
