import dataclasses
import math

import pytest
import torch

from kit import config
from kit.losses import pairs
from kit.losses.heads import Classifier, Head

COUNTS = torch.tensor([40, 7, 1, 100, 12])
CASES = {
    "arcface": Head(scale=8.0),
    "no margin": Head(margin=0.0, scale=16.0),
    "cosface": Head("cosface", 0.35, 8.0),
    "am_softmax": Head("am_softmax", 0.35, 8.0),
    "circle": Head("circle", 0.25, 6.0),
    "adacos": Head("adacos", 0.0),
    "adacos of 2019": Head("adacos", 0.2, adacos_angle=1.25),
    "adacos's fixed scale": Head(scale=0.0),
    "softmax": Head("softmax"),
    "smoothing": Head(scale=8.0, smoothing=0.1),
    "smooth softmax": Head("softmax", smoothing=0.3),
    "sub-centres": Head(scale=8.0, centres=3, smoothing=0.1),
    "sub-centres of adacos": Head("adacos", 0.1, centres=2),
    "rare margins": Head(margin=0.05, scale=8.0, rare_margin=0.45),
    "other rare margins": Head(
        "cosface", 0.1, 8.0, rare_margin=0.2, rare_power=1.0, centres=2
    ),
    "growing": Head(scale=8.0, margin_start=0.1, margin_epochs=4.0),
    "class weights": Head(scale=8.0, class_power=0.5),
    "noisy": Head("softmax", noisy_weight=0.25, class_power=1.0),
}
EPOCH = 1.5


def rescaled(cosines, labels, last, angle):
    """AdaCos's scale, one cosine after another."""
    total, angles = 0.0, []
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        total += sum(math.exp(last * c) for k, c in enumerate(row) if k != label)
        angles.append(math.acos(row[label]))
    middle = sorted(angles)[(len(angles) - 1) // 2]
    return math.log(total / len(angles)) / math.cos(min(angle, middle))


def slow(head, counts, weight, bias, embedding, labels, trusted, epoch):
    """The loss, image after image and class after class, in float64 through autograd."""
    classes, n = len(counts), counts.double()
    frequency = n**-head.class_power
    frequency = frequency * n.sum() / (frequency * n).sum()
    rare = n**-head.rare_power
    rare = head.rare_margin * (rare - rare.min()) / (rare.max() - rare.min())
    base = head.margin
    if epoch < head.margin_epochs:
        way = epoch / head.margin_epochs
        base = (1 - way) * head.margin_start + way * head.margin
    rows = []
    for x in embedding:
        if head.loss == "softmax":
            rows.append(weight @ x + bias)
            continue
        each = [w @ x / (w.norm() * x.norm()) for w in weight]
        grouped = zip(*[iter(each)] * head.centres, strict=True)
        rows.append(torch.stack([max(group) for group in grouped]))
    scale = head.scale or math.sqrt(2) * math.log(classes - 1)
    if head.loss == "adacos":
        first = math.log(classes - 1) / math.cos(head.adacos_angle)
        values = torch.stack(rows).detach()
        scale = rescaled(values, labels, first, head.adacos_angle)
    total = 0.0
    for row, label, trust in zip(rows, labels.tolist(), trusted.tolist(), strict=True):
        logits = []
        for k, c in enumerate(row):
            m = base + rare[label].item()
            if head.loss in ("arcface", "adacos") and k == label:
                c = (
                    (c.acos() + m).cos()
                    if c.acos() + m < math.pi
                    else c - math.sin(m) * m
                )
            elif head.loss in ("cosface", "am_softmax") and k == label:
                c = c - m
            elif head.loss == "circle" and k == label:
                c = (1 + m - c.item()) * (c - (1 - m))
            elif head.loss == "circle":
                c = max(c.item() + m, 0) * (c - m)
            logits.append(c if head.loss == "softmax" else scale * c)
        chances = torch.stack(logits).log_softmax(0)
        loss = -(1 - head.smoothing) * chances[label] - head.smoothing * chances.mean()
        total = total + loss * frequency[label] * (1 if trust else head.noisy_weight)
    return total / len(labels)


def batch():
    """Six embeddings of four numbers; trust in all but two; labels of five classes."""
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    trusted = torch.tensor([True, False, True, True, False, True])
    return 3 * torch.randn(6, 4, generator=random), labels, trusted


def classifier(head, counts=COUNTS, dim=4):
    torch.manual_seed(0)
    model = Classifier(head, dim, counts)
    if head.loss == "softmax":
        torch.nn.init.normal_(model.bias)
    return model


def close(own, expected):
    """To 1e-5 of the largest entry."""
    assert (own - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("head", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_definition(head):
    embedding, labels, trusted = batch()
    model = classifier(head)
    with torch.no_grad():  # one past a straight angle
        embedding[5] = -2 * model.weight[head.centres] + torch.tensor([0.1, 0, 0, 0])
    x = embedding.requires_grad_()
    model(x, labels, trusted, EPOCH).backward()
    exact = [x, model.weight, *([model.bias] if head.loss == "softmax" else [])]
    exact = [value.detach().double().requires_grad_() for value in exact]
    bias = exact[2] if head.loss == "softmax" else None
    expected = slow(head, COUNTS, exact[1], bias, exact[0], labels, trusted, EPOCH)
    expected.backward()
    loss = classifier(head)(x, labels, trusted, EPOCH)
    assert loss.dtype == torch.float32 and loss.shape == ()
    close(loss.detach(), expected.detach())
    for own, right in zip((x, *model.parameters()), exact, strict=True):
        close(own.grad, right.grad)


@pytest.mark.parametrize("head", CASES.values(), ids=CASES)
def test_under_autocast_the_loss_is_computed_in_float32(head):
    embedding, labels, _ = batch()
    half = embedding.bfloat16()
    expected = classifier(head)(half.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = classifier(head)(half, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("head", CASES.values(), ids=CASES)
def test_an_embedding_on_its_centre_has_finite_gradients(head):
    model, labels = classifier(head), torch.arange(5)
    for sign in (1, -1, 0):
        x = (sign * model.weight.detach()[labels * head.centres]).requires_grad_()
        model(x, labels).backward()
        assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["arcface", "circle", "adacos", "sub-centres"])
def test_lengths_of_embeddings_and_centres_do_not_matter(name):
    embedding, labels, _ = batch()
    loss = classifier(CASES[name])(embedding, labels)
    model = classifier(CASES[name])
    with torch.no_grad():
        model.weight *= torch.linspace(0.1, 10, len(model.weight))[:, None]
    factors = torch.tensor([0.01, 1, 2, 5, 100, 3])[:, None]
    torch.testing.assert_close(model(embedding * factors, labels), loss)


def test_a_margin_makes_the_loss_larger():
    embedding, labels, _ = batch()
    losses = [
        classifier(Head(margin=margin))(embedding, labels).item()
        for margin in (0.0, 0.1, 0.3, 0.5)
    ]
    assert losses == sorted(set(losses))


def test_class_weights_have_a_mean_of_1_over_the_images():
    weights = classifier(Head(class_power=0.5)).class_weights
    assert (weights * COUNTS).sum() / COUNTS.sum() == pytest.approx(1)
    assert weights[2] / weights[3] == pytest.approx(10)


def test_a_class_without_images_is_counted_as_one_of_a_single_image():
    head = Head(rare_margin=0.4, class_power=0.5)
    model = classifier(head, torch.tensor([0, 1, 50, 50]))
    assert model.class_margins.tolist() == pytest.approx([0.4, 0.4, 0, 0])
    assert model.class_weights[0] == model.class_weights[1]


def test_without_word_of_trust_all_labels_are_trusted():
    embedding, labels, _ = batch()
    head = Head(noisy_weight=0.0)
    loss = classifier(head)(embedding, labels)
    assert loss == classifier(head)(embedding, labels, torch.ones(6, dtype=torch.bool))
    assert classifier(head)(embedding, labels, torch.zeros(6, dtype=torch.bool)) == 0


def test_adacos_keeps_its_scale_when_it_does_not_train():
    embedding, labels, _ = batch()
    model = classifier(CASES["adacos"])
    before = model.scale.item()
    assert before == pytest.approx(math.sqrt(2) * math.log(4))
    model.eval()(embedding, labels)
    assert model.scale == before
    model.train()(embedding, labels)
    assert model.scale != before


def test_losses_between_images_are_added_with_their_weights():
    embedding, labels, _ = batch()
    plain = classifier(Head())(embedding, labels)
    for changes, extra in (
        ({"triplet": 0.5}, 0.5 * pairs.triplet(embedding, labels, 0.3)),
        (
            {"triplet": 2.0, "triplet_margin": 0.0},
            2 * pairs.triplet(embedding, labels, 0.0),
        ),
        ({"contrastive": 0.5}, 0.5 * pairs.contrastive(embedding, labels, 0.7)),
        (
            {"contrastive": 1.0, "contrastive_margin": 1.0},
            pairs.contrastive(embedding, labels, 1.0),
        ),
    ):
        loss = classifier(Head(**changes))(embedding, labels)
        torch.testing.assert_close(loss, plain + extra)


def test_class_means_follow_their_images_and_pull_them():
    embedding, labels, _ = batch()
    x = embedding.requires_grad_()
    model = classifier(Head(centre_loss=0.1))
    plain = classifier(Head())(embedding, labels)
    loss = model(x, labels)
    torch.testing.assert_close(loss, plain + 0.1 * x.square().sum(1).mean() / 2)
    (pull,) = torch.autograd.grad(loss - classifier(Head())(x, labels), x)
    torch.testing.assert_close(pull, 0.1 * x.detach() / 6, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.means[0], 0.5 * x[0] / 2
        )  # one image: of 1 + 1
        torch.testing.assert_close(model.means[1], 0.5 * (x[1] + x[5]) / 3)
    before = model.means.clone()
    model.eval()(x, labels)
    assert torch.equal(model.means, before)


def test_the_first_rows_are_uniform_up_to_xavier_s_bound():
    torch.manual_seed(0)
    model = Classifier(Head(centres=3), 500, torch.ones(300, dtype=torch.int64))
    bound = math.sqrt(6 / (900 + 500))
    assert 0.9999 * bound < model.weight.max() <= bound
    assert model.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert len(model.weight.unique(dim=0)) == 900


def test_the_state_is_a_row_for_each_centre_and_little_more():
    def shapes(head):
        return {k: tuple(v.shape) for k, v in classifier(head).state_dict().items()}

    assert shapes(Head()) == {"weight": (5, 4)}
    assert shapes(Head(centres=3)) == {"weight": (15, 4), "centres": ()}
    assert shapes(Head("softmax")) == {"weight": (5, 4), "bias": (5,)}
    assert shapes(Head("adacos")) == {"weight": (5, 4), "scale": ()}
    assert shapes(Head(centre_loss=1.0)) == {"weight": (5, 4), "means": (5, 4)}


def test_sampling_keeps_the_batch_s_classes_and_as_many_more_as_asked():
    head = Head(scale=8.0, sampled=0.2, centres=2, smoothing=0.1)
    counts, labels = torch.ones(50, dtype=torch.int64), torch.tensor([3, 3, 49, 7])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = classifier(head, counts, 6)
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(x, labels)
        loss.backward()
        used = model.weight.grad.abs().amax(1).reshape(50, 2).amax(1) > 0
        kept = used.nonzero().flatten()
        assert len(kept) == 10 and {3, 7, 49} <= set(kept.tolist())
        drawn.add(tuple(kept.tolist()))
        small = Classifier(dataclasses.replace(head, sampled=1.0), 6, counts[kept])
        small.weight.data = model.weight.data.reshape(50, -1)[kept].reshape(20, 6)
        expected = small(x, torch.searchsorted(kept, labels))
        torch.testing.assert_close(loss, expected)
        torch.manual_seed(seed)
        assert model(x, labels) == loss
    assert len(drawn) == 8
    whole = classifier(dataclasses.replace(head, sampled=1.0), counts, 6)
    torch.testing.assert_close(model.eval()(x, labels), whole(x, labels))


def test_a_batch_of_more_classes_than_the_share_is_kept_whole():
    model = classifier(Head("softmax", sampled=0.01))
    embedding, labels, _ = batch()
    model(embedding, labels).backward()
    assert (model.weight.grad.abs().amax(1) > 0).all()


def test_the_embeddings_are_not_modified():
    embedding, labels, trusted = batch()
    before = embedding.clone(), labels.clone()
    classifier(Head(triplet=1.0, centre_loss=1.0))(embedding, labels, trusted)
    assert torch.equal(embedding, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("wrong", [5, -1])
def test_a_label_that_is_no_class_is_refused(wrong):
    embedding, labels, _ = batch()
    with pytest.raises(IndexError, match="a label is not one of 5 classes"):
        classifier(Head())(embedding, labels.where(labels != 2, wrong))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"loss": "sphere"},
            "head: loss 'sphere' is not one of arcface, cosface, am_softmax, adacos,",
        ),
        ({"margin": -0.1}, "head: margin is -0.1, not at least 0"),
        ({"scale": -1.0}, "head: scale is -1.0, not at least 0"),
        ({"centres": 0}, "head: centres is 0, not at least 1"),
        ({"smoothing": 1.0}, "head: smoothing is 1.0, not below 1"),
        ({"margin": 28.6}, "head: margin is 28.6, .* 28.6 degrees are 0.4992"),
        (
            {"loss": "cosface", "margin": 1.1},
            "margin is 1.1, not at most 1 for cosface",
        ),
        ({"margin": 1.0, "rare_margin": 1.0}, "margin . rare_margin is 2, not at"),
        ({"sampled": 0.0}, "head: sampled is 0.0, not at least"),
        ({"triplet": float("nan")}, "head: triplet cannot be nan"),
        ({"loss": "softmax", "centres": 3}, "softmax has no centres to choose from"),
        ({"loss": "circle", "rare_margin": 0.1}, "circle has no margin of a class"),
        ({"loss": "softmax", "rare_margin": 0.1}, "softmax has no margin of a class"),
        ({"margins": 0.1}, r"no field 'margins' \(close: margin\)"),
    ],
)
def test_what_no_classifier_can_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        config.change(Head(), **fields)


def test_adacos_needs_three_classes():
    for head in (Head("adacos"), Head(scale=0.0)):
        with pytest.raises(ValueError, match="2 classes are too few for AdaCos"):
            Classifier(head, 4, torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("head", "state", "words"),
    [
        (Head(), {}, "file: weight is missing for loss arcface"),
        (
            Head(),
            {"weight": torch.zeros(5, 4), "bias": torch.zeros(5)},
            "file: bias is unknown for loss arcface",
        ),
        (
            Head(),
            {"weight": torch.zeros(6, 4)},
            "file: weight: 6 classes do not fit in 5",
        ),
        (
            Head(),
            {"weight": torch.zeros(5, 3)},
            r"file: weight has rows of \(3,\), not \(4,\)",
        ),
        (
            Head(centres=3),
            {"weight": torch.zeros(10, 4), "centres": torch.tensor(2)},
            "file: 2 centres a class, not 3",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(head, state, words):
    with pytest.raises(ValueError, match=words):
        classifier(head).load_full(state, "file")


def test_a_state_of_fewer_classes_fills_the_first():
    head = Head("softmax", centre_loss=0.1)
    old, model = classifier(head), classifier(head, torch.ones(8, dtype=torch.int64))
    embedding, labels, _ = batch()
    old(embedding, labels)  # moves the means
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_full(old.full_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value[:5], old.state_dict()[name])
        assert torch.equal(value[5:], drawn[name][5:])
