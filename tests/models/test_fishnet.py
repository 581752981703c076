from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kit.models.fishnet import (
    DEPTHS,
    FishNet,
    ReduceChannels,
    double,
    from_release,
    halve,
    is_release,
)
from kit.models.net import statistics_kept
from kit.models.weights import load_strictly
from tests.models.originals import Weights

# every stage has another depth or width than its neighbours
TAIL, BRIDGE = (1, 2, 1), 2
BODY, HEAD = ((1, 1), (2, 1), (1, 2)), ((1, 2), (2, 1), (1, 3))
WIDTHS, BODY_WIDTHS = (8, 16, 32, 64), (64, 48, 32)
CHANNELS = [40, 104, 200, 264]
CODE, LATER, BARE = "the code's", "later files'", "later files', a bare shortcut"


def small(**options) -> FishNet:
    parts = (TAIL, BRIDGE, BODY, HEAD, WIDTHS, BODY_WIDTHS)
    return FishNet(*parts, **({"num_classes": 0, "global_pool": ""} | options))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(height=64, width=96, count=2):
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, height, width, generator=random)


# The released network, typed again: its names, one line a stage, nothing in loops over stages


def bottleneck(w, x, name, out, k=0, dilation=1, bare=False) -> Tensor:
    """k: 0 where the shortcut does not add channels; bare: it is a convolution alone."""
    y = w.batch_norm(x, f"{name}.bn1").relu()
    y = w.convolve(y, f"{name}.conv1", out // 4, 1)
    y = w.batch_norm(y, f"{name}.bn2").relu()
    y = w.convolve(y, f"{name}.conv2", out // 4, 3, dilation=dilation)
    y = w.batch_norm(y, f"{name}.bn3").relu()
    y = w.convolve(y, f"{name}.conv3", out, 1)
    if k:
        return y + sum(x[:, i::k] for i in range(k))
    if bare:
        return y + w.convolve(x, f"{name}.shortcut", out, 1)
    if x.shape[1] == out:
        return y + x
    x = w.batch_norm(x, f"{name}.shortcut.0").relu()
    return y + w.convolve(x, f"{name}.shortcut.2", out, 1)


def several(w, x, name, out, count, k=0, dilation=1, bare=False) -> Tensor:
    x = bottleneck(w, x, f"{name}.0", out, k, dilation, bare)
    for i in range(1, count):
        x = bottleneck(w, x, f"{name}.{i}", out, dilation=dilation)
    return x


def pooled(x) -> Tensor:
    """The largest of each 2 x 2; of what is there at an odd border."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
    corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


def enlarged(x, like) -> Tensor:
    rows = torch.arange(like.shape[2]) // 2
    columns = torch.arange(like.shape[3]) // 2
    return x[:, :, rows][:, :, :, columns]


def stem(w, x) -> Tensor:
    x = w.batch_norm(w.convolve(x, "conv1.0", 4, 3, stride=2), "conv1.1").relu()
    x = w.batch_norm(w.convolve(x, "conv2.0", 4, 3), "conv2.1").relu()
    x = w.batch_norm(w.convolve(x, "conv3.0", 8, 3), "conv3.1").relu()
    return F.max_pool2d(x, 3, 2, padding=1)


def score(w, x, convolution, norm, last, out) -> Tensor:
    """Half the channels, then `out`: behind the bridge's first norm, and the head's."""
    x = w.convolve(x.relu(), convolution, x.shape[1] // 2, 1)
    return w.convolve(w.batch_norm(x, norm).relu(), last, out, 1, bias=True)


def bridge(w, x, spelling) -> Tensor:
    at = "fish.fish.3"
    names = [f"{at}.0.2", f"{at}.0.3", f"{at}.1"]
    if spelling != CODE:
        names = [f"{at}.1.0", f"{at}.1.1", f"{at}.1.3"]
    x = score(w, w.batch_norm(x, f"{at}.0.0"), *names, 128)
    gate = w.batch_norm(x, f"{at}.3.0.0").relu().mean((2, 3), keepdim=True)
    gate = w.convolve(gate, f"{at}.3.0.3", 4, 1, bias=True).relu()
    gate = w.convolve(gate, f"{at}.3.0.5", 64, 1, bias=True).sigmoid()
    return several(w, x, f"{at}.2", 64, 2) * gate + gate


def join(*maps) -> Tensor:
    return torch.cat(maps, 1)


def original(
    w: Weights, x: Tensor, spelling: str = CODE
) -> tuple[list[Tensor], Tensor]:
    """The last four stage maps, and the scores of 5 classes."""
    f, at = [stem(w, x)], "fish.fish"
    bare = spelling == BARE
    f += [pooled(several(w, f[0], f"{at}.0.0", 16, 1, bare=bare))]
    f += [pooled(several(w, f[1], f"{at}.1.0", 32, 2))]
    f += [pooled(several(w, f[2], f"{at}.2.0", 64, 1))]
    f += [bridge(w, f[3], spelling)]
    side = several(w, f[2], f"{at}.4.1", 32, 1)
    f += [join(enlarged(several(w, f[4], f"{at}.4.0", 64, 1, 1, 1), side), side)]
    side = several(w, f[1], f"{at}.5.1", 16, 1)
    f += [join(enlarged(several(w, f[5], f"{at}.5.0", 48, 2, 2, 2), side), side)]
    side = several(w, f[0], f"{at}.6.1", 8, 2)
    f += [join(enlarged(several(w, f[6], f"{at}.6.0", 32, 1, 2, 4), side), side)]
    side = several(w, f[6], f"{at}.7.1", 64, 2)
    f += [join(pooled(several(w, f[7], f"{at}.7.0", 40, 1)), side)]
    side = several(w, f[5], f"{at}.8.1", 96, 1)
    f += [join(pooled(several(w, f[8], f"{at}.8.0", 104, 2)), side)]
    side = several(w, f[4], f"{at}.9.1", 64, 3)
    f += [join(pooled(several(w, f[9], f"{at}.9.0", 200, 1)), side)]
    names = {
        CODE: ("9.3.0", "9.3.2", "9.3.3", "9.4.1"),
        LATER: ("9.3.0", "9.4.0", "9.4.1", "9.4.4"),
        BARE: ("9.2.0", "9.3.0", "9.3.1", "9.3.4"),
    }[spelling]
    first, *others = (f"{at}.{name}" for name in names)
    # the mean commutes with the last convolution
    scores = score(w, w.batch_norm(f[10], first), *others, 5).mean((2, 3))
    return f[7:], scores


def as_released(w: Weights, spelling: str) -> dict[str, Tensor]:
    """As the files have it: from several GPUs, the later ones without batch counts."""
    return {
        f"module.{key}": value
        for key, value in w.items()
        if spelling == CODE or not key.endswith("num_batches_tracked")
    }


@pytest.fixture
def released() -> dict[str, Tensor]:
    w = Weights()
    original(w, images(64, 64))
    return as_released(w, CODE)


# The same network


@torch.inference_mode()
@pytest.mark.parametrize("spelling", [CODE, LATER, BARE])
def test_released_weights_give_the_maps_of_the_original(spelling):
    w, x = Weights(), images()
    expected, _ = original(w, x, spelling)
    net = small().eval()
    load_strictly(net, from_release(as_released(w, spelling)), "release")
    maps = net.stage_maps(x)
    for ours, theirs in zip(maps, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(net.forward_features(x), maps[-1])


@torch.inference_mode()
@pytest.mark.parametrize("size", [(33, 64), (70, 101), (31, 17)])
def test_a_size_that_32_does_not_divide_is_rounded_up_at_every_stride(size):
    w, x = Weights(), images(*size)
    expected, _ = original(w, x)
    net = small().eval()
    load_strictly(net, from_release(w), "release")
    for i, (ours, theirs) in enumerate(zip(net.stage_maps(x), expected, strict=True)):
        stride = 4 * 2**i
        assert ours.shape[2:] == tuple(-(-side // stride) for side in size)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_scores_are_those_of_the_original():
    w, x = Weights(), images()
    _, expected = original(w, x)
    weights = from_release(w)
    names = {
        "9.3.0": "score.0.norm",
        "9.3.2": "score.0.conv",
        "9.3.3": "score.1",
        "9.4.1": "classifier.fc",
    }
    for theirs, ours in names.items():
        at = f"fish.fish.{theirs}."
        for key in [key for key in w if key.startswith(at)]:
            weights[f"{ours}.{key.removeprefix(at)}"] = w[key]
    weights["classifier.fc.weight"] = weights["classifier.fc.weight"][:, :, 0, 0]
    net = small(num_classes=5, global_pool="avg").eval()
    load_strictly(net, weights, "release")
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    hidden = net.forward_head(net.forward_features(x), pre_logits=True)
    assert hidden.shape == (2, net.head_hidden_size)
    torch.testing.assert_close(net.get_classifier()(hidden), net(x))


def test_convolutions_start_with_the_variance_that_keeps_gradients():
    torch.manual_seed(0)
    narrow = small().get_submodule("head.2.refine.0.residual.0.conv")
    assert narrow.weight.shape == (50, 200, 1, 1)
    assert narrow.weight.std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.05)


def test_channels_are_added_in_groups_of_neighbours():
    x = torch.tensor([1.0, 2, 10, 20, 100, 200]).view(1, 6, 1, 1)
    assert ReduceChannels(2)(x).flatten().tolist() == [3, 30, 300]
    assert ReduceChannels(3)(x).flatten().tolist() == [13, 320]


def test_halving_and_doubling_meet_at_odd_sizes():
    x = torch.tensor([[1.0, 5, 2], [0, 3, 4], [7, 6, 9]])[None, None]
    assert halve(x).flatten().tolist() == [5, 4, 7, 9]
    doubled = [[5.0, 5, 4], [5, 5, 4], [7, 7, 9]]
    assert double(halve(x), x.shape[-2:])[0, 0].tolist() == doubled


# Published figures


@cache
def weightless(name, **options) -> FishNet:
    """A network that knows its shapes and holds nothing; not to be changed."""
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("fishnet99", 16.62e6, 4.31e9),
        ("fishnet150", 24.96e6, 6.45e9),
        ("fishnet201", 44.58e6, 10.58e9),
    ],
)
def test_the_network_costs_what_was_published(name, parameters, multiply_adds):
    net = weightless(name)
    with FlopCounterMode(display=False) as counter:
        assert net(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert total == pytest.approx(parameters, rel=1e-3)
    # the published count has norms and activations too
    assert counter.get_total_flops() == pytest.approx(2 * multiply_adds, rel=0.02)


@pytest.mark.parametrize("size", [(512, 352), (448, 448), (544, 800), (500, 333)])
def test_fishnet150_has_4864_channels_in_four_maps(size):
    net = weightless("fishnet150", num_classes=0, global_pool="")
    maps = net.stage_maps(torch.empty(1, 3, *size, device="meta"))
    assert net.stage_channels == [320, 832, 1600, 2112]
    assert sum(net.stage_channels) == 4864
    for channels, stride, given in zip(
        net.stage_channels, (4, 8, 16, 32), maps, strict=True
    ):
        sides = (-(-side // stride) for side in size)
        assert given.shape == (1, channels, *sides)


# What users of timm expect


@pytest.mark.parametrize("name", DEPTHS)
def test_timm_knows_the_network_and_what_it_is_fed(name):
    assert timm.is_model(name)
    net = weightless(name, num_classes=0, global_pool="")
    x = torch.empty(2, 3, 64, 32, device="meta")
    assert net(x).shape == (2, net.num_features, 2, 1)
    about = timm.data.resolve_model_data_config(net)
    assert about["input_size"] == (3, 224, 224)
    assert about["mean"] == (0.485, 0.456, 0.406)
    assert net.get_submodule(net.pretrained_cfg["first_conv"]).in_channels == 3
    assert net.num_features == 2112
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


def test_without_classes_nothing_of_the_classifier_is_left():
    net = small()
    assert not [key for key in net.state_dict() if key.startswith(("score", "class"))]
    x = images()
    pooled_maps = small(global_pool="avg").eval()
    pooled_maps.load_state_dict(net.state_dict())
    torch.testing.assert_close(pooled_maps(x), net.eval()(x).mean((2, 3)))


def test_the_classifier_can_be_replaced_and_removed():
    net = small(num_classes=5, global_pool="avg", drop_rate=0.25).double().eval()
    keys = small().state_dict().keys()
    x = images().double()
    assert net(x).shape == (2, 5) and net.head_hidden_size == 132
    assert net.classifier.drop.p == 0.25
    net.reset_classifier(7)
    assert net(x).shape == (2, 7) and net.get_classifier().out_features == 7
    assert net.num_classes == 7 and not net.score.training
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 264, 2, 3) and net.head_hidden_size == 264
    assert net.state_dict().keys() == keys


@torch.inference_mode()
def test_feature_info_says_what_timm_s_feature_extraction_gives():
    net = timm.create_model("fishnet99", features_only=True).eval()
    maps = net(images(64, 40, 1))
    assert net.feature_info.channels() == [given.shape[1] for given in maps]
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert [given.shape[2] for given in maps] == [16, 8, 4, 2]
    info = small().feature_info
    assert [stage["num_chs"] for stage in info] == small().stage_channels == CHANNELS


def test_recomputed_activations_change_nothing():
    torch.manual_seed(0)
    kept, recomputed = small().train(), small().train()
    recomputed.load_state_dict(kept.state_dict())
    recomputed.set_grad_checkpointing()
    saved = {}
    for net in (kept, recomputed):
        inside: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, inside=inside: inside.append(t.numel()) or t, lambda t: t
        ):
            loss = net(images()).square().mean()
        with statistics_kept(net):
            loss.backward()
        saved[net] = loss.item(), sum(inside)
    assert saved[kept][0] == saved[recomputed][0]
    assert saved[recomputed][1] < saved[kept][1] / 2
    pairs = zip(kept.named_parameters(), recomputed.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert ours.grad.any() or "conv.bias" in name, name
        assert torch.equal(ours.grad, theirs.grad), name
    for key, value in kept.state_dict().items():  # a batch counts once
        assert torch.equal(value, recomputed.state_dict()[key]), key
    recomputed.set_grad_checkpointing(False)
    assert not any(getattr(m, "grad_checkpointing", 0) for m in recomputed.modules())


@torch.inference_mode()
def test_in_evaluation_an_image_always_has_the_same_maps():
    net, x = small().double().eval(), images(count=3).double()
    together = net.stage_maps(x)
    for first, again in zip(together, net.stage_maps(x), strict=True):
        assert torch.equal(first, again)
    for whole, alone in zip(together, net.stage_maps(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone)


# Released files


def test_only_released_files_have_their_keys(released):
    assert is_release(released)
    assert is_release([key.removeprefix("module.") for key in released])
    assert not is_release(small().state_dict())
    assert not is_release(["fish.weight", "conv1.0.weight"])


def test_batch_counts_that_a_file_lacks_are_zero_and_others_stay(released):
    key = "bridge.gate.0.num_batches_tracked"
    assert from_release(released)[key] == 7
    older = {k: v for k, v in released.items() if not k.endswith("tracked")}
    assert from_release(older)[key] == 0
    assert from_release(older).keys() == from_release(released).keys()


def test_a_released_file_is_not_changed(released):
    before = dict(released)
    from_release(released)
    assert released == before


def test_a_file_of_another_depth_is_refused_by_its_first_key(released):
    deeper = FishNet((2, 2, 1), *(BRIDGE, BODY, HEAD, WIDTHS, BODY_WIDTHS), 0)
    with pytest.raises(ValueError, match=r"^a\.tar: no tail\.0\.1\.residual\.0\.norm"):
        load_strictly(deeper, from_release(released), "a.tar")
    shallower = FishNet((1, 1, 1), *(BRIDGE, BODY, HEAD, WIDTHS, BODY_WIDTHS), 0)
    with pytest.raises(ValueError, match=r"^a\.tar: tail\.1\.1\.\S+ is not in the net"):
        load_strictly(shallower, from_release(released), "a.tar")


@pytest.mark.parametrize(
    "key", ["fish.fish.0.0.0.bn4.weight", "fish.fish.4.2.0.bn1.bias", "epoch"]
)
def test_a_key_that_no_release_has_is_named(released, key):
    weights = from_release(released | {f"module.{key}": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"^a.tar: {key} is not in the network$"):
        load_strictly(small(), weights, "a.tar")
