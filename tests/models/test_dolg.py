import pytest
import torch
from torch.nn import functional as F

from kit.models import pooling
from kit.models.dolg import DOLG, RATES, MultiAtrous, SelfAttention, orthogonal
from kit.models.pooling import GeM


@pytest.fixture
def layer():
    """4 channels in the third stage, 6 in the fourth; batch norms that saw something."""
    torch.manual_seed(0)
    dolg = DOLG(4, 6, GeM(2.5))
    with torch.no_grad():
        dolg.local[0].mean.bias.copy_(torch.tensor([-2.0, 2.0]))
        dolg([3 * torch.rand(4, 4, 9, 7) - 1, torch.rand(4, 6, 5, 4)])
    return dolg.eval()


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(1)
    third = torch.rand(2, 4, 9, 7, generator=generator)
    return [third, torch.rand(2, 6, 5, 4, generator=generator)]


# Orthogonal fusion


def test_a_local_feature_keeps_only_what_stands_at_a_right_angle():
    local = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    along = orthogonal(local, torch.tensor([[5.0, 0.0]]))  # the second axis is left
    torch.testing.assert_close(along.flatten(), torch.tensor([0.0, 4.0]))
    # (3, 4) on (1, 1): the projection is 3.5 (1, 1)
    across = orthogonal(local, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(across.flatten(), torch.tensor([-0.5, 0.5]))


def test_every_place_of_every_image_is_freed_of_its_own_vector():
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(2, 5, 3, 4, generator=generator)
    vectors = torch.randn(2, 5, generator=generator)
    result = orthogonal(local, vectors)
    for image in range(2):
        g = vectors[image]
        for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(4)):
            feature = local[image, :, row, column]
            expected = feature - (feature @ g) / (g @ g) * g
            torch.testing.assert_close(result[image, :, row, column], expected)
            assert abs(result[image, :, row, column] @ g) < 1e-5


def test_the_length_and_sign_of_the_global_vector_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(1, 5, 3, 4, generator=generator)
    vector = torch.randn(1, 5, generator=generator)
    expected = orthogonal(local, vector)
    for factor in (-1.0, 0.01, 100.0):
        torch.testing.assert_close(orthogonal(local, factor * vector), expected)
    torch.testing.assert_close(orthogonal(expected, vector), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fused_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(2, 5, 3, 4, generator=generator).to(dtype)
    vector = (300 * torch.randn(2, 5, generator=generator)).to(dtype)
    result = orthogonal(local, vector)  # squares of 300 leave float16's range
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, orthogonal(local.float(), vector.float()))


def test_a_global_vector_of_zeros_frees_of_nothing_and_has_finite_gradients():
    local = torch.ones(1, 3, 2, 2, requires_grad=True)
    vector = torch.zeros(1, 3, requires_grad=True)
    result = orthogonal(local, vector)
    assert torch.equal(result, local)
    result.sum().backward()
    assert torch.isfinite(local.grad).all() and torch.isfinite(vector.grad).all()


# The layer


def convolved(x, convolution, rate=1):
    """A convolution of odd size, one place after another, zeros outside."""
    kernel = convolution.weight
    reach = kernel.shape[-1] // 2
    height, width = x.shape[-2:]
    out = torch.zeros(len(x), len(kernel), height, width)
    out += convolution.bias[:, None, None]
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            part = kernel[:, :, i + reach, j + reach]
            for row in range(height):
                for column in range(width):
                    y, z = row + i * rate, column + j * rate
                    if 0 <= y < height and 0 <= z < width:
                        out[:, :, row, column] += x[:, :, y, z] @ part.T
    return out


@torch.no_grad()
def test_the_layer_is_the_paper_s(layer, maps):
    third, fourth = maps
    atrous, attention = layer.local
    scales = [
        convolved(third, c, rate)
        for c, rate in zip(atrous.dilated, (6, 12, 18), strict=True)
    ]
    mean = third.mean(dim=(2, 3)) @ atrous.mean.weight[:, :, 0, 0].T + atrous.mean.bias
    scales.append(mean.relu()[..., None, None].expand(-1, -1, 9, 7))
    seen = convolved(torch.cat(scales, dim=1), atrous.fuse).relu()

    normed = convolved(seen, attention.project)
    norm = attention.norm
    spread = (norm.running_var + norm.eps).sqrt()[:, None, None]
    normed = (normed - norm.running_mean[:, None, None]) / spread
    weight = (1 + convolved(normed.relu(), attention.weight).exp()).log()
    local = weight * normed / normed.square().sum(dim=1, keepdim=True).sqrt()

    pooled = fourth.pow(2.5).mean(dim=(2, 3)).pow(1 / 2.5)
    vector = pooled @ layer.project.weight.T + layer.project.bias
    apart = orthogonal(local, vector).mean(dim=(2, 3))
    expected = torch.cat([vector, apart], dim=1)
    torch.testing.assert_close(layer(maps), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, layer.dim)


def test_far_places_are_seen_by_the_dilated_convolutions_alone():
    torch.manual_seed(0)
    atrous = MultiAtrous(4)
    torch.nn.init.zeros_(atrous.mean.weight)
    x = torch.rand(1, 4, 40, 40, requires_grad=True)
    atrous(x)[0, :, 20, 20].sum().backward()
    seen = x.grad[0].abs().sum(dim=0).nonzero() - 20
    steps = {0} | {sign * rate for rate in RATES for sign in (1, -1)}
    assert {abs(i) for i in seen.flatten().tolist()} == {abs(i) for i in steps}
    assert all(i == 0 or j == 0 or abs(i) == abs(j) for i, j in seen.tolist())


def test_attention_weighs_directions_of_unit_length():
    torch.manual_seed(0)
    attention = SelfAttention(4).eval()
    x = torch.rand(2, 4, 5, 3)
    lengths = attention(x).norm(dim=1, keepdim=True)
    weight = F.softplus(attention.weight(attention.norm(attention.project(x)).relu()))
    torch.testing.assert_close(lengths, weight)


def test_what_the_local_branch_adds_stands_at_a_right_angle_to_the_vector(layer, maps):
    vector, apart = layer(maps).split(4, dim=1)
    dots = (vector * apart).sum(dim=1)
    assert dots.abs().max() < 1e-5
    assert apart.norm(dim=1).min() > 1e-3


def test_both_branches_and_the_power_learn(layer, maps):
    dolg = pooling.create("dolg", [4, 6], 2.0, trainable=True)
    dolg([m.requires_grad_() for m in maps]).square().sum().backward()
    for name, parameter in dolg.named_parameters():
        if name != "local.1.project.bias":  # the batch norm takes it out again
            assert parameter.grad.abs().max() > 0, name
    assert all(m.grad.abs().max() > 0 for m in maps)
    assert dolg.pool.p.requires_grad and dolg.pool.p == 2.0
    assert not layer.pool.p.requires_grad


@torch.no_grad()
def test_under_autocast_the_fusion_is_in_float32(layer, maps):
    with torch.autocast("cpu", torch.bfloat16):
        pooled = layer(maps)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, layer(maps), rtol=0.05, atol=0.05)
    vector, apart = pooled.split(4, dim=1)
    assert (vector * apart).sum(dim=1).abs().max() < 1e-5
