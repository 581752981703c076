import copy

import pytest
import timm
import torch
from torch import nn

from kit.models import ibn


@pytest.fixture
def norm():
    """A batch norm of five channels that has seen something."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    with torch.no_grad():
        norm(torch.randn(4, 5, 3, 2) * 3 + 1)
    return norm


def test_the_first_half_is_normalised_by_image_and_the_rest_by_running_statistics(norm):
    x = torch.randn(3, 5, 4, 2)
    y = ibn.IBN(norm).eval()(x)
    for b, c in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        mean, variance = norm.running_mean[c], norm.running_var[c]
        if c < 2:  # int(5 / 2) channels
            mean, variance = x[b, c].mean(), x[b, c].var(unbiased=False)
        expected = (x[b, c] - mean) / (variance + 1e-3).sqrt()
        expected = expected * norm.weight[c] + norm.bias[c]
        torch.testing.assert_close(y[b, c], expected, rtol=1e-4, atol=1e-5)


def test_in_training_the_batch_half_learns_as_the_batch_norm_would_have(norm):
    x = torch.randn(3, 5, 4, 2)
    half = ibn.IBN(norm).train()
    y, expected = half(x), norm.train()(x)
    torch.testing.assert_close(y[:, 2:], expected[:, 2:])
    torch.testing.assert_close(half.batch.running_mean, norm.running_mean[2:])
    torch.testing.assert_close(half.batch.running_var, norm.running_var[2:])
    assert half.batch.num_batches_tracked == norm.num_batches_tracked == 2


def test_an_image_s_instance_half_does_not_depend_on_the_batch(norm):
    x = torch.randn(3, 5, 4, 2)
    half = ibn.IBN(norm).train()
    torch.testing.assert_close(half(x[:1])[:, :2], half(x)[:1, :2])


@pytest.mark.parametrize("name", ["resnet26", "seresnet18", "resnet10t", "test_resnet"])
def test_bn1_of_every_block_but_the_last_stage_s_is_converted_and_nothing_else(name):
    plain = timm.create_model(name, num_classes=0, global_pool="")
    net = copy.deepcopy(plain)
    ibn.convert(net)
    converted = {n for n, module in net.named_modules() if isinstance(module, ibn.IBN)}
    assert converted == {
        f"layer{stage}.{i}.bn1"
        for stage in (1, 2, 3)
        for i in range(len(getattr(plain, f"layer{stage}")))
    }
    others = {n: type(m) for n, m in plain.named_modules() if n not in converted}
    kept = {n: type(m) for n, m in net.named_modules() if n in others}
    assert kept == others


def test_a_converted_network_has_as_many_parameters():
    plain = timm.create_model("resnet26", num_classes=0, global_pool="")
    net = copy.deepcopy(plain)
    ibn.convert(net)
    assert sum(p.numel() for p in net.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )
