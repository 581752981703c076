import dataclasses
import math

import pytest
import torch
from torch import nn

from kit.data.inputs import InputSpec
from kit.models.net import NetConfig, build
from kit.training import optim
from kit.training.optim import Optim

DECAYS = Optim(0.1, weight_decay=0.5, norm_decay=0.3, bias_decay=0.2, bias_lr=2.0)


def slow_cosine(t: float, base: float, total: float, warmup: float) -> float:
    """The 2021 system's schedule at t epochs, section by section."""
    if t < warmup:
        return 0.01 * base + t * (base - 0.01 * base) / warmup
    if t >= total:
        return 0.002 * base
    return 0.002 * base + 0.5 * (base - 0.002 * base) * (
        1 + math.cos(math.pi * t / total)
    )


@pytest.mark.parametrize("warmup", [0.0, 1.0, 1.5])
def test_the_learning_rate_follows_the_cosine_of_2021(warmup):
    how = Optim(0.08, warmup=warmup)
    for step in range(0, 89, 3):
        expected = slow_cosine(step / 8, 0.08, 10, warmup)
        assert optim.learning_rate(how, step / 8, 10) == pytest.approx(expected)


def test_the_cosine_of_2019_ends_at_its_floor():
    """torch's own CosineAnnealingLR, stepped per iteration, is what was run."""
    parameter = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1e-3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 35, eta_min=3e-6)
    how = Optim(1e-3, floor=3e-3)
    for step in range(36):
        rate = theirs.param_groups[0]["lr"]
        assert optim.learning_rate(how, step / 5, 7) == pytest.approx(rate, rel=1e-6)
        theirs.step()
        annealing.step()


def test_multistep_falls_at_its_milestones():
    how = Optim(1.0, schedule="multistep", milestones=(2, 3.5), gamma=0.1, warmup=1)
    rates = [optim.learning_rate(how, epoch, 5) for epoch in (0.5, 1, 1.9, 2, 3.4, 3.5)]
    assert rates == pytest.approx([0.505, 1, 1, 0.1, 0.1, 0.01])


def by_name(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        names[id(p)]: group for group in optimizer.param_groups for p in group["params"]
    }


def test_every_parameter_has_the_decay_and_rate_of_its_kind():
    config = NetConfig(
        "test_efficientnet",
        dim=16,
        neck_bias=True,
        pool_trainable=True,
        input=InputSpec(32),
    )
    net, head = build(config), nn.Linear(16, 5, bias=False)
    ours, heads = optim.build(net, head, dataclasses.replace(DECAYS, head_lr=3.0))
    groups = by_name(net, ours)
    assert set(groups) == {name for name, _ in net.named_parameters()}
    for name, parameter in net.named_parameters():
        facts = (groups[name]["weight_decay"], groups[name]["factor"])
        if name == "pool.p" or name.endswith(".p"):
            assert facts == (0.0, 1.0)
        elif name.endswith("bias"):
            assert facts == (0.2, 2.0)
        else:
            assert facts == (0.5 if parameter.ndim > 1 else 0.3, 1.0)
    assert len(ours.param_groups) == 4
    assert (heads.param_groups[0]["weight_decay"], heads.param_groups[0]["factor"]) == (
        0.5,
        3.0,
    )
    optim.set_learning_rate((ours, heads), 0.01)
    assert groups["neck.0.bias"]["lr"] == pytest.approx(0.02)
    assert heads.param_groups[0]["lr"] == pytest.approx(0.03)


def test_rates_fall_with_depth_as_timm_counts_it():
    import timm.optim

    net = build(NetConfig("test_vit", dim=16, input=InputSpec(32)))
    how = Optim(0.1, "adamw", layer_decay=0.5)
    groups = by_name(net, optim.build(net, nn.Linear(16, 5), how)[0])
    theirs = timm.optim.param_groups_layer_decay(net.backbone, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    for name, parameter in net.backbone.named_parameters():
        factor = groups[f"backbone.{name}"]["factor"]
        assert factor == pytest.approx(scale[id(parameter)]), name
    assert groups["neck.0.weight"]["factor"] == 1
    assert min(group["factor"] for group in groups.values()) < 0.5


def test_momentum_is_plain_sgd():
    first, second = (nn.Linear(3, 2, bias=False) for _ in range(2))
    second.load_state_dict(first.state_dict())
    (ours, _) = (
        optim._create([{"params": first.parameters(), "factor": 1.0}], Optim(0.1)),
        0,
    )
    theirs = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for module, optimizer in ((first, ours), (second, theirs)):
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(first.weight, second.weight)


def test_clipping_is_that_of_all_gradients_together():
    net, head = nn.Linear(4, 3), nn.Linear(3, 5)
    for parameter in (*net.parameters(), *head.parameters()):
        parameter.grad = torch.randn_like(parameter)
    kept = [p.grad.clone() for p in (*net.parameters(), *head.parameters())]
    optim.clip(net, head, 0.5, world=1)
    norm = math.sqrt(sum(float(g.square().sum()) for g in kept))
    for parameter, grad in zip(
        (*net.parameters(), *head.parameters()), kept, strict=True
    ):
        torch.testing.assert_close(
            parameter.grad, grad * 0.5 / norm, rtol=1e-4, atol=1e-7
        )
    before = net.weight.grad.clone()
    optim.clip(net, head, 100.0, world=1)
    assert torch.equal(net.weight.grad, before)
