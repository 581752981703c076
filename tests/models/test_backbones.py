import re

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kit.models import backbones
from kit.models.backbones import PRESETS, channels, create, maps
from kit.models.ibn import IBN


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def meta():
    """Networks without numbers: only their shapes and costs."""
    with torch.device("meta"):
        yield


def images(height: int, width: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height)


# The published sizes


# parameters of the backbone alone, millions; 1e9 operations an image, a multiply-add is two, of
# backbone, linear neck to 512 without bias and batch norm, without classifier, at output stride 16
PUBLISHED = [
    ("resnet50", 256, 23.5, 16.2),
    ("seresnet101_ibn_a", 384, 47.2, 58.3),
    ("seresnet101_ibn_a", 512, 47.2, 103.7),
    ("resnext101_ibn_a", 384, 42.1, 58.5),
    ("resnext101_ibn_a", 512, 42.1, 103.9),
    ("resnest101e", 384, 46.2, 70.3),
    ("resnest101e", 512, 46.2, 125.1),
    pytest.param("resnest269e", 448, 108.9, 219.8, marks=pytest.mark.slow),
    ("resnest269e", 512, 108.9, 287.1),
    ("resnet101_ibn_a", 384, None, 58.3),
    ("tf_efficientnet_b7", 512, None, 117.4),
]


@pytest.mark.parametrize("name, size, millions, giga", PUBLISHED)
def test_a_preset_costs_what_the_2021_system_s_network_does(
    name, size, millions, giga, meta
):
    backbone = create(name, stride=16).eval()
    neck = nn.Sequential(
        nn.Linear(backbone.num_features, 512, bias=False), nn.BatchNorm1d(512)
    ).eval()
    with FlopCounterMode(display=False) as counter:
        (last,) = maps(backbone, images(size, batch=1))
        neck(last.mean((2, 3)))
    assert last.shape == (1, backbone.num_features, size // 16, size // 16)
    assert counter.get_total_flops() / 1e9 == pytest.approx(giga, rel=2e-3)
    if millions:
        count = sum(p.numel() for p in backbone.parameters())
        assert count / 1e6 == pytest.approx(millions, rel=2e-3)
    assert sum(p.numel() for p in neck.parameters()) == 512 * (
        backbone.num_features + 2
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_four_stages_up_to_stride_32_and_ibn_if_it_is_called_so(
    name, meta
):
    backbone = create(name).eval()
    given = maps(backbone, images(64, batch=1), 4)
    assert [m.shape[1] for m in given] == channels(backbone, 4)
    assert [m.shape[2:] for m in given] == [(side, side) for side in (16, 8, 4, 2)]
    has = any(isinstance(module, IBN) for module in backbone.modules())
    assert has == name.endswith("_ibn_a")


def test_the_resnet50_of_2021_pools_where_it_downsamples_and_keeps_the_plain_stem(meta):
    backbone = create("resnet50")
    assert isinstance(backbone.conv1, nn.Conv2d)
    for layer in (backbone.layer2, backbone.layer3, backbone.layer4):
        assert isinstance(layer[0].downsample[0], nn.AvgPool2d)
    timms_own = create("resnet50.tv_in1k")
    assert isinstance(timms_own.layer2[0].downsample[0], nn.Conv2d)


def test_the_2019_se_resnext_is_not_timm_s_newer_one(meta):
    keys = create("legacy_seresnext101_32x4d").state_dict().keys()
    assert "layer1.0.se_module.fc1.bias" in keys
    assert keys != create("seresnext101_32x4d").state_dict().keys()


# Stride 16


def strides(backbone: nn.Module) -> list[tuple[str, int, int]]:
    """(name, stride, dilation) of every convolution and pooling that has either."""
    found = []
    for name, module in backbone.named_modules():
        if isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)):
            stride, dilation = module.stride, getattr(module, "dilation", 1)
            stride, dilation = (
                v if isinstance(v, int) else v[0] for v in (stride, dilation)
            )
            if (stride, dilation) != (1, 1):
                found.append((name, stride, dilation))
    return found


def difference(name: str) -> set[tuple[str, int, int]]:
    """What stride 16 takes away (and, for dilations, brings)."""
    return set(strides(create(name))) ^ set(strides(create(name, stride=16)))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet50", {("layer4.0.conv2", 2, 1), ("layer4.0.downsample.0", 2, 1)}),
        ("resnet101", {("layer4.0.conv2", 2, 1), ("layer4.0.downsample.0", 2, 1)}),
        ("resnet18", {("layer4.0.conv1", 2, 1), ("layer4.0.downsample.0", 2, 1)}),
        (
            "resnext101_ibn_a",
            {("layer4.0.conv2", 2, 1), ("layer4.0.downsample.0", 2, 1)},
        ),
        (
            "resnest101e",
            {
                ("layer4.0.avd_last", 2, 1),
                ("layer4.0.downsample.0", 2, 1),
                ("layer4.1.conv2.conv", 1, 2),
                ("layer4.2.conv2.conv", 1, 2),
            },
        ),
        ("tf_efficientnet_b5", {("blocks.5.0.conv_dw", 2, 1)}),
        ("tf_efficientnetv2_b0", {("blocks.5.0.conv_dw", 2, 1)}),
    ],
)
def test_stride_16_changes_the_last_stage_alone(name, expected, meta):
    assert difference(name) == expected
    assert (
        create(name).state_dict().keys() == create(name, stride=16).state_dict().keys()
    )


def test_stride_16_of_resnest_keeps_the_pooling_that_timm_s_own_drops(meta):
    ours = create("resnest101e", stride=16)
    timms = timm.create_model("resnest101e", num_classes=0, output_stride=16)
    assert ours.layer4[0].avd_last.stride == 1 and timms.layer4[0].avd_last is None


@pytest.mark.parametrize(
    "name",
    ["legacy_seresnext101_32x4d", "fishnet150", "test_vit", "convnext_tiny", "vgg16"],
)
def test_other_networks_refuse_stride_16(name, meta):
    with pytest.raises(ValueError, match=f"^stride 16: {name} has no .* use stride 0$"):
        create(name, stride=16)


def test_stride_16_is_refused_twice_and_where_a_network_blurs(meta):
    backbone = create("resnet18", stride=16)
    with pytest.raises(ValueError, match="^stride 16: this network has no such form"):
        backbones.set_stride_16(backbone)
    with pytest.raises(ValueError, match="^stride 16: resnetaa50d blurs where it"):
        create("resnetaa50d", stride=16)


@pytest.mark.parametrize("stride", [8, 32, -16])
def test_a_stride_that_is_neither_is_refused(stride):
    with pytest.raises(ValueError, match=f"^stride {stride} is not one of 0 .*, 16$"):
        create("resnet50", stride=stride)


# Maps

SMALL = [  # of every native form: maps, maps with channels last, tokens with and without prefix
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_mambaout",
    "test_vit",
    "test_vit3",
    "test_vit_relpos",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_small_050",
]


@torch.inference_mode()
@pytest.mark.parametrize("name", SMALL)
def test_maps_are_what_timm_s_own_intermediates_are(name):
    torch.manual_seed(0)
    backbone, x = create(name, size=96).eval(), images(96)
    _, timms = backbone.forward_intermediates(x, indices=2, norm=True)
    given = maps(backbone, x, 2)
    assert [m.shape[1] for m in given] == channels(backbone, 2)
    assert given[0].shape == timms[0].shape
    (alone,) = maps(backbone, x)
    torch.testing.assert_close(alone, given[1])
    features = backbone.forward_features(x)
    if features.ndim == 4 and features.shape == alone.shape:
        torch.testing.assert_close(alone, features)
    else:  # tokens, or channels last: timm brings them to a grid too
        assert features.shape != alone.shape
        torch.testing.assert_close(alone, timms[1])
    assert alone.shape[1] == channels(backbone)[0] == backbone.num_features


@torch.inference_mode()
def test_the_earlier_maps_of_a_convolutional_network_are_its_stages_ends():
    backbone = create("test_resnet").eval()
    x, seen = images(64), {}
    for i in (3, 4):
        getattr(backbone, f"layer{i}").register_forward_hook(
            lambda _, __, y, i=i: seen.update({i: y.clone()})
        )
    third, fourth = maps(backbone, x, 2)
    torch.testing.assert_close(third, seen[3])
    torch.testing.assert_close(fourth, seen[4])


@torch.inference_mode()
def test_patch_tokens_lie_where_their_patches_were():
    """A patch that changes changes its own token most, on a grid that is not square."""
    torch.manual_seed(0)
    backbone = create("test_vit").eval()
    assert backbone.num_prefix_tokens == 1
    x = images(96, 160, batch=1)
    other = x.clone()
    other[:, :, 32:48, 112:128] += 3  # row 2, column 7 of patches of 16 pixels
    (before,), (after,) = maps(backbone, x), maps(backbone, other)
    assert before.shape == (1, 64, 6, 10)
    change = (after - before).norm(dim=1)[0]
    assert change.argmax() == 2 * 10 + 7


@torch.inference_mode()
def test_a_vit_at_another_size_interpolates_its_positions_as_timm_does():
    torch.manual_seed(0)
    backbone = create("test_vit", size=96).eval()
    fixed = timm.create_model("test_vit", num_classes=0, global_pool="", img_size=96)
    weights = dict(backbone.state_dict())
    assert weights["pos_embed"].shape == (1, 101, 64)  # of its own 160 pixels
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], (6, 6))
    fixed.load_state_dict(weights)
    x = images(96)
    tokens = fixed.eval().forward_features(x)
    expected = tokens[:, 1:].transpose(1, 2).reshape(2, 64, 6, 6)
    torch.testing.assert_close(maps(backbone, x)[0], expected)


@torch.inference_mode()
def test_a_network_that_fixes_its_size_is_made_for_the_one_asked_for():
    name = "swin_tiny_patch4_window7_224"
    assert maps(create(name, size=64), images(64))[0].shape == (2, 768, 2, 2)
    keys = create(name, size=256).state_dict().keys()
    assert keys == create(name).state_dict().keys()


def test_a_size_that_patches_do_not_fill_is_refused(meta):
    with pytest.raises(
        ValueError, match=r"^size 512 .* vit_small_patch14_dinov2's .* use 504 or 518$"
    ):
        create("vit_small_patch14_dinov2", size=512)
    assert create("vit_small_patch14_dinov2", size=518)


def test_layers_between_the_features_and_the_classifier_are_not_kept(meta):
    for name in ("mobilenetv3_small_050", "vgg11", "vit_relpos_small_patch16_224"):
        whole = set(timm.create_model(name, num_classes=0).state_dict())
        kept = set(create(name).state_dict())
        assert kept < whole
        gone = {key.split(".")[0] for key in whole - kept}
        assert gone <= set(backbones.HEADS) | {"head"}, name


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_takes_part_in_the_last_map(name):
    backbone = create(name, size=96)
    maps(backbone, images(96))[0].sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_fishnet_s_own_maps_are_used(meta):
    backbone = create("fishnet99")
    given = maps(backbone, images(64), 3)
    assert [m.shape[1] for m in given] == channels(backbone, 3)
    assert given[-1].shape == maps(backbone, images(64))[0].shape
    assert len(maps(backbone, images(64), 4)) == 4


@pytest.mark.parametrize("stages", [0, 6, -1])
def test_stages_that_are_not_there_are_refused(stages, meta):
    backbone = create("resnet18")
    for asked in (channels, lambda b, n: maps(b, images(64), n)):
        with pytest.raises(ValueError, match=f"^stages {stages} is not in 1 to 5"):
            asked(backbone, stages)


def test_what_gives_no_map_is_refused(meta):
    crossvit = create("crossvit_tiny_240")
    with pytest.raises(ValueError, match="^CrossVit gives several things for images"):
        maps(crossvit, images(240))
    volo = create(
        "volo_d1_224"
    )  # its class token is among the others, and says so nowhere
    with pytest.raises(
        ValueError, match=r"^VOLO gives \(2, 197, 384\) for images \(2, 3"
    ):
        maps(volo, images(224))


# Names and drop path


def test_a_distilled_vit_loses_both_of_its_extra_tokens(meta):
    backbone = create("deit_tiny_distilled_patch16_224")
    assert maps(backbone, images(224))[0].shape == (2, 192, 14, 14)


def test_an_unknown_name_is_refused_with_names_that_are_close_and_the_presets():
    with pytest.raises(ValueError, match=r"^backbone 'seresnet101_ibn' .*") as caught:
        create("seresnet101_ibn")
    message = str(caught.value)
    assert "\n" not in message
    close, _, presets = message.partition("; presets: ")
    assert re.search(r"close: .*\bseresnet101_ibn_a\b", close)
    assert presets == ", ".join(PRESETS)
    with pytest.raises(ValueError, match="^backbone 'qqqq' is not one of timm's; pres"):
        create("qqqq")


@pytest.mark.parametrize("name", ["resnet50", "test_vit", "test_convnext"])
def test_drop_path_grows_to_the_rate_at_the_last_block(name, meta):
    rates = [
        part.drop_prob
        for part in create(name, drop_path=0.3).modules()
        if isinstance(part, DropPath)
    ]
    assert max(rates) == rates[-1] == pytest.approx(0.3)
    assert rates == sorted(rates)
    assert not any(isinstance(part, DropPath) for part in create(name).modules())


@pytest.mark.parametrize(
    "name", ["resnest101e", "legacy_seresnext101_32x4d", "fishnet99", "vgg11"]
)
def test_drop_path_is_refused_where_there_is_none(name, meta):
    with pytest.raises(ValueError, match=f"^{name} has no drop path: set drop_path to"):
        create(name, drop_path=0.1)
