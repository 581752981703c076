import math

import pytest
import torch
from pytorch_metric_learning import losses as published

from kit.losses import margins
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


LOGITS = {
    "arcface": margins.arcface,
    "cosface": margins.cosface,
    "am_softmax": margins.am_softmax,
    "circle": margins.circle,
}


@pytest.mark.parametrize(
    ("function", "margin", "scale"),
    [(margins.cosface, 0.35, 64), (margins.am_softmax, 0.35, 30)],
)
def test_a_cosine_margin_is_subtracted_from_the_label_s_cosine(
    cosines, function, margin, scale
):
    expected = scale * cosines
    expected[:, 1] -= scale * margin
    torch.testing.assert_close(function(cosines, LABELS), expected)
    expected[:, 1] += scale * (margin - 0.2)
    torch.testing.assert_close(function(cosines, LABELS, 0.2), expected)


def test_circle_weighs_each_cosine_by_what_it_lacks(cosines):
    margin, scale = 0.25, 256.0
    x = cosines.clone().requires_grad_()
    logits = margins.circle(x, LABELS)
    logits.sum().backward()
    for row in range(41):
        for column in range(3):
            c = cosines[row, column].item()
            if column == 1:
                weight = max(1 + margin - c, 0)
                expected = scale * weight * (c - (1 - margin))
            else:
                weight = max(c + margin, 0)
                expected = scale * weight * (c - margin)
            assert logits[row, column].item() == pytest.approx(expected, abs=1e-3)
            assert x.grad[row, column].item() == pytest.approx(scale * weight, abs=1e-3)


@pytest.mark.parametrize("function", LOGITS.values(), ids=LOGITS)
def test_a_label_of_other_columns_leaves_a_row_without_target(cosines, function):
    """Logits of halves of the columns are the halves of the logits."""
    labels = torch.arange(41) % 3
    first, second = labels.where(labels < 2, -1), (labels - 2).where(labels >= 2, -1)
    x = cosines.clone().requires_grad_()
    whole = function(x, labels)
    halves = function(x[:, :2], first), function(x[:, 2:], second)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=0, atol=0)
    weights = torch.linspace(-1, 1, 123).reshape(41, 3)
    (expected,) = torch.autograd.grad((whole * weights).sum(), x)
    (own,) = torch.autograd.grad((torch.cat(halves, 1) * weights).sum(), x)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["arcface", "cosface", "am_softmax"])
def test_images_may_have_margins_of_their_own(cosines, name):
    own, labels = torch.linspace(0, 0.6, 41), torch.arange(41) % 3
    logits = LOGITS[name](cosines, labels, own, 20.0)
    for row in range(41):
        one = LOGITS[name](cosines[row : row + 1], labels[row : row + 1], own[row], 20)
        torch.testing.assert_close(logits[row], one[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", LOGITS.values(), ids=LOGITS)
def test_all_logits_are_float32_and_all_gradients_finite(function, dtype):
    extreme = torch.tensor([[1.0, -1], [-1, 1], [1.01, -1.01], [0, 0]]).to(dtype)
    for labels in (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        x = extreme.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = function(x, labels)
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        logits.sum().backward()
        assert x.grad.isfinite().all() and torch.equal(x.detach(), extreme)


def test_the_nearest_of_a_class_s_centres_counts():
    values = torch.tensor([[0.1, 0.5, 0.3, -0.2, -0.1, -0.9]]).requires_grad_()
    nearest = margins.sub_centres(values, 3)
    assert torch.equal(nearest, torch.tensor([[0.5, -0.1]]))
    nearest.sum().backward()
    assert values.grad.tolist() == [[0, 1, 0, 0, 1, 0]]
    assert margins.sub_centres(values, 1) is values


def test_adacos_s_fixed_scale_is_that_of_its_paper():
    for classes in (10, 81_313):
        expected = math.sqrt(2) * math.log(classes - 1)
        assert margins.fixed_scale(classes) == pytest.approx(expected)
    # the 2019 system assumes an angle of 1.25 instead of a quarter of a straight one
    assert margins.fixed_scale(1000, 1.25) == pytest.approx(math.log(999) / 0.3153224)


@pytest.mark.parametrize("angle", [math.pi / 4, 1.25])
@pytest.mark.parametrize("near", [0.2, 0.95])
def test_adacos_s_scale_follows_the_median_angle_of_the_targets(near, angle):
    random = torch.Generator().manual_seed(0)
    cosines = torch.rand(5, 9, generator=random) - 0.5
    cosines[range(5), range(5)] = near + 0.01 * torch.arange(5)
    last = 12.0
    total, angles = 0.0, []
    for row in range(5):
        for column in range(9):
            c = cosines[row, column].item()
            if column == row:
                angles.append(math.acos(c))
            else:
                total += math.exp(last * c)
    expected = math.log(total / 5) / math.cos(min(angle, sorted(angles)[2]))
    others = (last * cosines).fill_diagonal_(-math.inf).logsumexp(1)
    own = margins.dynamic_scale(others, cosines.diagonal(), angle)
    assert own.item() == pytest.approx(expected, rel=1e-5)


def test_adacos_s_scale_is_at_least_1():
    few = torch.full((4,), -3.0)
    assert margins.dynamic_scale(few, torch.zeros(4)) == 1


def test_rarity_stretches_a_power_of_the_counts_from_0_to_1():
    counts = torch.tensor([10_000, 1, 16, 81, 0])
    lowest = 10_000**-0.25
    expected = [
        0,
        1,
        (1 / 2 - lowest) / (1 - lowest),
        (1 / 3 - lowest) / (1 - lowest),
        1,
    ]
    torch.testing.assert_close(margins.rarity(counts), torch.tensor(expected))
    assert margins.rarity(counts, 0.5)[2].item() == pytest.approx(0.24 / 0.99)
    assert not margins.rarity(torch.tensor([7, 7])).any()


def test_a_growing_margin_goes_straight_to_its_end():
    grown = [margins.growing(epoch, 0.1, 0.5, 4) for epoch in (0, 1, 3, 4, 9)]
    assert grown == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    assert margins.growing(0, 0.1, 0.5, 0) == 0.5


@pytest.mark.parametrize("name", ["arcface", "cosface", "sub-center"])
def test_logits_are_those_of_pytorch_metric_learning(name):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=random)
    centres = 3 if name == "sub-center" else 1
    weight = torch.randn(5 * centres, 6, generator=random)
    labels = torch.arange(9) % 5
    x[8] = -weight[labels[8] * centres] + 0.1 * x[8]  # past a straight angle
    sizes = {"num_classes": 5, "embedding_size": 6, "scale": 20}
    if name == "cosface":
        other = published.CosFaceLoss(margin=0.4, **sizes)
    elif name == "arcface":
        other = published.ArcFaceLoss(margin=math.degrees(0.4), **sizes)
    else:
        other = published.SubCenterArcFaceLoss(margin=math.degrees(0.4), **sizes)
    other.W.data = weight.T.contiguous()
    theirs = x.clone().requires_grad_()
    expected = other(theirs, labels)
    expected.backward()

    ours, rows = x.clone().requires_grad_(), weight.clone().requires_grad_()
    normalize = torch.nn.functional.normalize
    cosines = margins.sub_centres(normalize(ours) @ normalize(rows).T, centres)
    function = margins.cosface if name == "cosface" else margins.arcface
    loss = torch.nn.functional.cross_entropy(function(cosines, labels, 0.4, 20), labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.grad, other.W.grad.T, rtol=1e-4, atol=1e-6)
