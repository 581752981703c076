import math

import pytest
import torch

from kit.losses.margins import arcface

MARGINS = [0.0, 0.3, 0.5]


def by_hand(cosines, labels, margin, scale):
    """ArcFace (2021 system's variant) one number after another, in float64."""
    logits = []
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        logits.append([])
        for column, c in enumerate(row):
            if column == label:
                if c > math.cos(math.pi - margin):
                    sine = math.sqrt(max(1 - c * c, 0.0))
                    c = c * math.cos(margin) - sine * math.sin(margin)
                else:
                    c = c - math.sin(math.pi - margin) * margin
            logits[-1].append(scale * c)
    return torch.tensor(logits, dtype=torch.float64)


@pytest.fixture
def cosines():
    """(41, 3): the label's column goes from -1 to 1, through both branches."""
    table = 2 * torch.rand(41, 3, generator=torch.Generator().manual_seed(0)) - 1
    table[:, 1] = torch.linspace(-1, 1, 41)
    return table


LABELS = torch.ones(41, dtype=torch.long)


@pytest.mark.parametrize("margin", MARGINS)
def test_arcface_matches_its_definition(cosines, margin):
    labels = torch.arange(41) % 3
    expected = by_hand(cosines, labels, margin, 30.0).float()
    torch.testing.assert_close(
        arcface(cosines, labels, margin, 30.0), expected, rtol=1e-5, atol=1e-4
    )
    expected = by_hand(cosines, LABELS, margin, 64.0).float()
    torch.testing.assert_close(
        arcface(cosines, LABELS, margin, 64.0), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("margin", MARGINS)
def test_the_margin_is_added_to_the_angle_until_the_sum_is_a_straight_angle(margin):
    angles = torch.linspace(0.01, math.pi - margin - 0.01, 50)
    logits = arcface(
        angles.cos()[:, None], torch.zeros(50, dtype=torch.long), margin, 1.0
    )
    torch.testing.assert_close(logits[:, 0], (angles + margin).cos())


@pytest.mark.parametrize("margin", [0.3, 0.5])
def test_past_a_straight_angle_the_logit_goes_on_downwards_with_slope_1(margin):
    angles = torch.linspace(math.pi - margin + 0.01, math.pi, 20)
    logits = arcface(
        angles.cos()[:, None], torch.zeros(20, dtype=torch.long), margin, 1.0
    )
    expected = angles.cos() - margin * math.sin(margin)
    torch.testing.assert_close(logits[:, 0], expected)
    assert (logits[:, 0] < -1).all()


@pytest.mark.parametrize("margin", MARGINS)
def test_a_larger_cosine_never_gives_a_smaller_logit(margin):
    target = torch.linspace(-1, 1, 2001)[:, None]
    logits = arcface(target, torch.zeros(2001, dtype=torch.long), margin)
    assert (logits.diff(dim=0) > 0).all()
    assert (logits <= 30 * target + 1e-5).all()


def test_without_a_margin_the_logits_are_scaled_cosines(cosines):
    torch.testing.assert_close(arcface(cosines, LABELS, 0.0, 30.0), 30 * cosines)


def test_only_the_label_s_column_is_bent(cosines):
    logits = arcface(cosines, LABELS, 0.5, 10.0)
    assert torch.equal(logits[:, [0, 2]], 10 * cosines[:, [0, 2]])
    assert (logits[1:, 1] < 10 * cosines[1:, 1]).all()


@pytest.mark.parametrize("margin", MARGINS)
def test_gradients_are_those_of_the_definition(cosines, margin):
    inside = cosines[1:-1]  # the definition has no slope at |cos| = 1
    labels, weights = LABELS[1:-1], torch.linspace(-1, 1, 39 * 3).reshape(39, 3)
    x = inside.clone().requires_grad_()
    (arcface(x, labels, margin) * weights).sum().backward()
    step = 1e-7
    high, low = (
        by_hand(inside.double() + s, labels, margin, 30.0) for s in (step, -step)
    )
    expected = ((high - low) / (2 * step) * weights).float()
    torch.testing.assert_close(x.grad, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("margin", MARGINS)
def test_gradients_are_finite_where_the_cosine_is_1_or_beyond(margin, dtype):
    ends = torch.tensor([[1.0], [-1.0], [1.0 + 1e-6], [-1.0 - 1e-6]], dtype=dtype)
    ends.requires_grad_()
    logits = arcface(ends, torch.zeros(4, dtype=torch.long), margin)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(ends.grad).all()
    assert (ends.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cosines_give_float32_logits(cosines, dtype):
    half = cosines.to(dtype)
    logits = arcface(half, LABELS, 0.3)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, arcface(half.float(), LABELS, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cosines_are_not_modified(cosines, dtype):
    given = cosines.to(dtype)
    before, labels = given.clone(), LABELS.clone()
    arcface(given, labels, 0.3)
    assert torch.equal(given, before)
    assert torch.equal(labels, LABELS)
