import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kit.losses import sharded
from kit.losses.heads import Classifier, Head

COUNTS = torch.tensor(
    [40, 7, 1, 100, 12, 3, 3]
)  # 7 classes: shares of 4 + 3, 3 + 2 + 2
CASES = {
    "arcface": Head(scale=16.0),
    "cosface": Head("cosface", 0.35, 64.0),
    "am_softmax": Head("am_softmax", 0.35, 30.0),
    "circle": Head("circle", 0.25, 32.0),
    "adacos": Head("adacos", 0.1, adacos_angle=1.5),
    "softmax": Head("softmax"),
    "smoothing": Head(scale=16.0, smoothing=0.1),
    "smooth softmax": Head("softmax", smoothing=0.3),
    "sub-centres": Head(scale=16.0, centres=3, smoothing=0.1),
    "rare margins": Head(margin=0.05, scale=16.0, rare_margin=0.45),
    "growing": Head(scale=16.0, margin_epochs=4.0, margin_start=0.1),
    "weights": Head("softmax", class_power=0.5, noisy_weight=0.3),
    "pairs": Head(triplet=0.5, contrastive=0.5),
    "class means": Head(centre_loss=0.1),
    "everything": Head(
        *("adacos", 0.1),
        centres=2,
        rare_margin=0.2,
        smoothing=0.1,
        class_power=0.3,
        noisy_weight=0.5,
        triplet=1.0,
        triplet_margin=0.0,
        contrastive=0.1,
        centre_loss=0.01,
    ),
}
STEPS = 2


def train(head, rank, world):
    """Some steps of a network under DDP and a classifier on 12 images, shared by ranks."""
    torch.manual_seed(0)
    net = nn.Linear(5, 8)
    torch.manual_seed(1)
    model = Classifier(head, 8, COUNTS, rank, world)
    wrapped = DistributedDataParallel(net) if world > 1 else net
    parameters = [*net.parameters(), *model.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)
    random = torch.Generator().manual_seed(1)
    found = {"losses": []}
    for step in range(STEPS):
        images = torch.randn(12, 5, generator=random)
        labels = torch.randint(7, (12,), generator=random)
        labels[2:10] = near(net(images[2:10]), head)
        trusted = torch.rand(12, generator=random) < 0.7
        own = slice(12 // world * rank, 12 // world * (rank + 1))
        loss = model(wrapped(images[own]), labels[own], trusted[own], float(step))
        optimizer.zero_grad()
        loss.backward()
        found["losses"].append(loss.detach())
        for name, parameter in net.named_parameters():
            found[f"{step} net.{name}"] = parameter.grad.clone()
        for name, parameter in model.named_parameters():
            gradient = model.gather(parameter.grad)
            found[f"{step} {name}"] = None if rank else gradient.clone()
        optimizer.step()
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    found["momentum"] = model.gather(momentum)
    state = model.full_state()
    assert (state is None) == (rank > 0)
    found["state"] = state and {name: value.clone() for name, value in state.items()}
    return found


def near(embedding, head):
    """The classes that first were nearest, so that not every image is far from its own."""
    torch.manual_seed(1)
    weight = Classifier(head, 8, COUNTS).weight
    cosines = embedding @ nn.functional.normalize(weight).T
    return cosines.argmax(1) // head.centres


SAMPLED = Head(sampled=0.3, scale=8.0, smoothing=0.2)
FEW = torch.tensor([0, 60, 31, 2, 59, 0])  # labels of 61 classes


def sample(rank, world):
    """Loss and classes that had a gradient, in steps of three seeds."""
    torch.manual_seed(0)
    counts = torch.ones(61, dtype=torch.int64)
    model = Classifier(SAMPLED, 8, counts, rank, world)
    own = slice(6 // world * rank, 6 // world * (rank + 1))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))[own]
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 * seed + rank)
        model.zero_grad()
        loss = model(x, FEW[own])
        loss.backward()
        gradient = model.gather(model.weight.grad)
        used = None if rank else gradient.abs().amax(1).nonzero().flatten()
        found.append((loss.item(), used))
    return found


def one_rank(rank, world, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    found = {name: train(head, rank, world) for name, head in CASES.items()}
    torch.save({"train": found, "sample": sample(rank, world)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each rank of a world found."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    mp.spawn(one_rank, (world, str(folder)), world)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def close(own, expected):
    """To 1e-5 of the largest entry."""
    assert own.shape == expected.shape
    assert (own - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process_with_the_whole_batch(ranks, name):
    alone = train(CASES[name], 0, 1)
    first = ranks[0]["train"][name]
    for rank in ranks:
        found = rank["train"][name]
        assert found["losses"] == first["losses"]  # the same number on every rank
        close(torch.stack(found["losses"]), torch.stack(alone["losses"]))
        for key in alone:
            if " net." in key:
                close(found[key], alone[key])
    for step in range(STEPS):
        close(first[f"{step} weight"], alone[f"{step} weight"])
    close(first["momentum"], alone["momentum"])
    assert first["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        close(first["state"][key], value)
        assert first["state"][key].is_contiguous()


def test_classes_are_sampled_by_step_and_the_batch_s_always_are(ranks):
    world = len(ranks)
    torch.manual_seed(0)
    whole = Classifier(SAMPLED, 8, torch.ones(61, dtype=torch.int64))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    for step, (loss, used) in enumerate(ranks[0]["sample"]):
        assert set(FEW.tolist()) <= set(used.tolist())
        assert len(used) == {2: 10 + 9, 3: 7 + 6 + 6}[world]  # three tenths, rounded up
        head = dataclasses.replace(SAMPLED, sampled=1.0)
        small = Classifier(head, 8, torch.ones(len(used), dtype=torch.int64))
        small.weight.data = whole.weight.data[used]
        expected = small(x, torch.searchsorted(used, FEW)).item()
        assert loss == pytest.approx(expected, rel=1e-5)
        assert all(rank["sample"][step][0] == loss for rank in ranks)
    (first, _), (again, _), (other, _) = ranks[0]["sample"]
    assert first == again != other


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_contiguous_and_differ_by_one_at_most(world):
    shares = [sharded.share(203_094, rank, world) for rank in range(world)]
    assert shares[0][0] == 0 and shares[-1][1] == 203_094
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    sizes = {end - start for start, end in shares}
    assert max(sizes) - min(sizes) <= 1


def parts(head, counts, world, dim=4, state=None):
    found = []
    for rank in range(world):
        torch.manual_seed(3)
        model = Classifier(head, dim, counts, rank, world)
        if state:
            model.load_full(state)
        found.append((model, torch.get_rng_state()))
    return found


@pytest.mark.parametrize("centres", [1, 2])
def test_the_first_rows_do_not_depend_on_the_number_of_ranks(centres):
    counts = torch.ones(5000, dtype=torch.int64)
    ((whole, after),) = parts(Head(centres=centres), counts, 1)
    for world in (2, 3):
        found = parts(Head(centres=centres), counts, world)
        rows = torch.cat([model.weight for model, _ in found])
        assert torch.equal(rows, whole.weight)
        assert all(torch.equal(later, after) for _, later in found)


@pytest.mark.parametrize("world", [2, 3])
def test_a_state_loads_at_any_number_of_ranks(world):
    head = Head("adacos", centres=3, centre_loss=0.1)
    ((whole, _),) = parts(head, COUNTS, 1)
    whole(torch.randn(4, 4), torch.tensor([0, 2, 4, 6]))
    state = whole.full_state()
    models = [model for model, _ in parts(head, COUNTS, world, state=state)]
    for name in ("weight", "means"):
        own = torch.cat([model.state_dict()[name] for model in models])
        assert torch.equal(own, state[name])
    assert all(model.scale == whole.scale for model in models)
    assert [len(model.rows(state["weight"])) for model in models] == [
        3 * (end - start)
        for start, end in (sharded.share(7, rank, world) for rank in range(world))
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_a_state_of_fewer_classes_fills_the_first_on_every_rank(world):
    ((old, _),) = parts(Head(centres=2), COUNTS[:3], 1)
    ((drawn, _),) = parts(Head(centres=2), COUNTS, 1)
    models = parts(Head(centres=2), COUNTS, world, state=old.full_state())
    own = torch.cat([model.weight for model, _ in models])
    assert torch.equal(own[:6], old.weight)
    assert torch.equal(own[6:], drawn.weight[6:])


def test_fewer_classes_than_ranks_are_refused():
    with pytest.raises(ValueError, match="7 classes do not spread over 8 ranks"):
        Classifier(Head(), 4, COUNTS, 0, 8)


@pytest.mark.parametrize("block", [1, 12, 1 << 19])
def test_cosines_and_their_gradients_are_exact(monkeypatch, block):
    """Against autograd in float64, whatever the size of the blocks."""
    monkeypatch.setitem(sharded.BLOCK, "cpu", block)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=random, dtype=torch.float64)
    w = torch.randn(7, 4, generator=random, dtype=torch.float64)
    gradient = torch.randn(3, 7, generator=random, dtype=torch.float64)
    x = nn.functional.normalize(x).requires_grad_()
    w.requires_grad_()
    expected = x @ nn.functional.normalize(w).T
    own = sharded.cosines(x, w)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(own, (x, w), gradient),
        torch.autograd.grad(expected, (x, w), gradient),
        rtol=1e-12,
        atol=1e-12,
    )


def test_cosines_leave_out_the_gradient_that_nobody_asked_for():
    x, w = torch.randn(3, 4), torch.randn(7, 4)
    for leaf in (x, w):
        leaf.requires_grad_()
        sharded.cosines(x, w).sum().backward()
        assert leaf.grad is not None
        leaf.requires_grad_(False)
    assert w.grad is not None and x.grad.shape == (3, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_losses_are_torch_s_cross_entropy(smoothing):
    random = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(6, 9, generator=random, dtype=torch.float64)
    logits[0] += 1e4  # no exponential of it exists
    labels = torch.tensor([0, 8, 3, 3, 1, 5])
    theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    expected = nn.functional.cross_entropy(
        theirs, labels, reduction="none", label_smoothing=smoothing
    )
    (expected * weights).sum().backward()
    losses = sharded.softmax_losses(ours, labels, smoothing)
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_heads_are_plain_values():
    """A head travels to ranks in a file: every case survives its dictionary."""
    for head in CASES.values():
        assert Head(**dataclasses.asdict(head)) == head
