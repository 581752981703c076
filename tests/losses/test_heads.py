import math

import pytest
import torch

from kit.losses.heads import ArcFace


def by_hand(embeddings, centres, labels, margin, scale):
    """Cross entropy of ArcFace's logits, one number after another, in float64."""
    total = 0.0
    for embedding, label in zip(embeddings.tolist(), labels.tolist(), strict=True):
        logits = []
        for number, centre in enumerate(centres.tolist()):
            product = sum(a * b for a, b in zip(embedding, centre, strict=True))
            cosine = product / (math.hypot(*embedding) * math.hypot(*centre))
            if number == label:
                if math.acos(cosine) + margin < math.pi:
                    cosine = math.cos(math.acos(cosine) + margin)
                else:
                    cosine = cosine - math.sin(margin) * margin
            logits.append(scale * cosine)
        highest = max(logits)
        among = sum(math.exp(logit - highest) for logit in logits)
        total += highest + math.log(among) - logits[label]
    return total / len(labels)


@pytest.fixture
def batch():
    """Six embeddings of four numbers, one of them nearly opposite to its centre; five classes."""
    random = torch.Generator().manual_seed(0)
    embedding = 3 * torch.randn(6, 4, generator=random)
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    torch.manual_seed(0)
    head = ArcFace(4, 5, margin=0.3, scale=8.0)
    embedding[5] = -2 * head.weight[1].detach() + torch.tensor([0.01, 0, 0, 0])
    return embedding, labels, head


def loss_by_hand(embedding, labels, head):
    return by_hand(
        embedding.double(),
        head.weight.detach().double(),
        labels,
        head.margin,
        head.scale,
    )


@pytest.mark.parametrize("scale", [8.0, 30.0])
@pytest.mark.parametrize("margin", [0.0, 0.3, 0.5])
def test_the_loss_is_the_cross_entropy_of_arcface_s_logits(batch, margin, scale):
    embedding, labels, head = batch
    head.margin, head.scale = margin, scale
    loss = head(embedding, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    expected = loss_by_hand(embedding, labels, head)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_the_slopes_of_the_loss(batch):
    embedding, labels, head = batch
    x = embedding.clone().requires_grad_()
    head(x, labels).backward()
    step = 1e-6
    for values, gradient, which in (
        (embedding, x.grad, 0),
        (head.weight.detach(), head.weight.grad, 1),
    ):
        for i in range(values.numel()):
            losses = []
            for s in (-step, step):
                moved = [embedding.double(), head.weight.detach().double()]
                moved[which] = moved[which].clone()
                moved[which].view(-1)[i] += s
                losses.append(by_hand(*moved, labels, head.margin, head.scale))
            slope = (losses[1] - losses[0]) / (2 * step)
            assert gradient.view(-1)[i].item() == pytest.approx(
                slope, rel=2e-3, abs=1e-4
            )


def test_lengths_of_embeddings_and_centres_do_not_matter(batch):
    embedding, labels, head = batch
    loss = head(embedding, labels)
    with torch.no_grad():
        head.weight *= torch.tensor([0.1, 1, 2, 5, 100])[:, None]
    factors = torch.tensor([0.01, 1, 2, 5, 100, 3])[:, None]
    torch.testing.assert_close(head(embedding * factors, labels), loss)


def test_numbering_the_classes_otherwise_does_not_matter(batch):
    embedding, labels, head = batch
    loss, order = head(embedding, labels), torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
    torch.testing.assert_close(head(embedding, order.argsort()[labels]), loss)


def test_a_margin_makes_the_loss_larger(batch):
    embedding, labels, head = batch
    losses = []
    for head.margin in (0.0, 0.1, 0.3, 0.5):
        losses.append(head(embedding, labels).item())
    assert losses == sorted(set(losses))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_loss_is_computed_in_float32(batch, dtype):
    embedding, labels, head = batch
    half = embedding.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(half, labels)
    assert loss.dtype == torch.float32
    expected = loss_by_hand(half, labels, head)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_embedding_that_lies_on_its_centre_has_finite_gradients(batch):
    _, labels, head = batch
    x = head.weight.detach()[labels].clone().requires_grad_()
    head(x, labels).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(head.weight.grad).all()


def test_the_centres_are_the_only_state_a_row_each():
    head = ArcFace(4, 5)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "weight": (5, 4)
    }
    assert (head.margin, head.scale) == (0.3, 30.0)
    assert len(head.weight.unique()) == 20


def test_the_embeddings_are_not_modified(batch):
    embedding, labels, head = batch
    before = embedding.clone()
    head(embedding, labels)
    assert torch.equal(embedding, before)


def test_a_label_that_is_no_class_is_refused(batch):
    embedding, labels, head = batch
    with pytest.raises(IndexError):
        head(embedding, labels + 1)
