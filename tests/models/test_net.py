import copy
import json
import re
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import DropPath

from kit import __version__, checksums, files
from kit import config as configs
from kit.data.inputs import InputSpec
from kit.models import backbones
from kit.models import net as nets
from kit.models.net import EmbeddingNet, NetConfig
from kit.models.pooling import gem, mac, spoc

SPEC = InputSpec(
    size=64, resize="crop", colour="bgr", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
CONFIG = NetConfig("test_resnet", pool_p=2.5, dim=8, input=SPEC)
EVERYTHING = NetConfig(  # no field as it is by default
    "test_resnet",
    pretrained="gone.pth",
    stride=16,
    drop_path=0.1,
    pool="SM,GC",
    pool_p=1.5,
    pool_trainable=True,
    neck="none",
    dim=7,
    neck_bias=True,
    neck_norm_bias=True,
    neck_init="normal",
    prelu=True,
    dropout=0.2,
    input=SPEC,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(images):
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    net = nets.build(CONFIG)
    with torch.no_grad():
        net.train()(3 * images + 1)
        net.neck[1].weight.uniform_(0.5, 2)
    return net.eval()


# Configuration


@pytest.mark.parametrize("config", [NetConfig(), CONFIG, EVERYTHING])
def test_a_config_survives_json(config):
    text = json.dumps(asdict(config))
    assert configs.from_dict(NetConfig, json.loads(text)) == config


def test_the_config_that_differs_everywhere_does():
    plain = asdict(NetConfig())
    assert all(value != plain[name] for name, value in asdict(EVERYTHING).items())


def test_every_field_of_a_config_is_in_model_json(tmp_path, net):
    about = files.read_json(nets.save(net, tmp_path, {}) / "model.json")
    assert about["config"] == json.loads(json.dumps(asdict(CONFIG)))
    expected = {"size": 64, "resize": "crop", "colour": "bgr"}
    expected |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    assert expected.items() <= about["config"]["input"].items()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("neck", "gap", "^neck 'gap' is not one of bn, none$"),
        ("neck_init", "he", "^neck_init 'he' is not one of uniform, normal$"),
        ("pool", "G,Q", "^pool 'G,Q': 'Q' is not one of G "),
        ("pool_p", 0.5, "^pool_p is 0.5, not at least 1$"),
        ("dim", 0, "^dim is 0, not at least 1$"),
        ("dim", "512", "^dim cannot be '512'$"),
        ("stride", -1, "^stride is -1, not at least 0$"),
        ("drop_path", 1.0, "^drop_path is 1.0, not at most 0.9$"),
        ("dropout", 1, "^dropout is 1, not at most 0.9$"),
        ("dropout", -0.1, "^dropout is -0.1, not at least 0$"),
        ("prelu", "no", "^prelu cannot be 'no'$"),
    ],
)
def test_a_field_that_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        NetConfig(**{field: value})


def test_an_unknown_field_or_input_rule_is_refused():
    with pytest.raises(ValueError, match="^colour 'gbr' is not one of rgb, bgr$"):
        configs.from_dict(NetConfig, {"input": {"colour": "gbr"}})
    with pytest.raises(ValueError, match="^NetConfig has no field 'poolp'$"):
        configs.from_dict(NetConfig, {"poolp": 3.0})


def test_an_unknown_backbone_is_refused_with_names_that_are_close():
    with pytest.raises(ValueError, match=r"^backbone 'resnet5O' .*\bresnet50\b"):
        nets.build(NetConfig("resnet5O"))


# The network


@torch.inference_mode()
def test_without_a_neck_the_embedding_is_the_pooled_feature_map(images):
    net = nets.build(replace(CONFIG, neck="none")).eval()
    (last,) = backbones.maps(net.backbone, images, 1)
    torch.testing.assert_close(net(images), gem(last, 2.5))
    assert net.dim == last.shape[1]


@torch.inference_mode()
def test_the_neck_is_a_linear_layer_and_then_a_batch_norm(net, images):
    pooled = gem(backbones.maps(net.backbone, images, 1)[0], 2.5)
    linear, norm = net.neck
    expected = torch.empty(4, 8)
    for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(8)).tolist():
        total = sum(pooled[i, c] * linear.weight[j, c] for c in range(len(pooled[i])))
        spread = (norm.running_var[j] + norm.eps).sqrt()
        expected[i, j] = (total - norm.running_mean[j]) / spread * norm.weight[j]
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert net.dim == 8


@torch.inference_mode()
def test_an_embedding_does_not_depend_on_its_batch(net, images):
    one_by_one = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), one_by_one, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_neck_ends_in_a_prelu_and_a_dropout_if_asked(net, images):
    longer = nets.build(replace(CONFIG, prelu=True, dropout=0.5)).eval()
    longer.load_state_dict(net.state_dict(), strict=False)
    longer.neck[2].weight.fill_(0.3)
    plain = net(images)
    expected = torch.where(plain > 0, plain, 0.3 * plain)
    torch.testing.assert_close(longer(images), expected)
    assert (plain < 0).any()
    torch.manual_seed(0)
    longer.neck[3].train()
    dropped = longer(images)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * expected[kept])


def test_the_batch_norm_of_the_neck_has_no_bias_to_train_unless_asked(net):
    linear, norm = net.neck
    assert linear.bias is None
    assert not norm.bias.requires_grad and not norm.bias.any()
    assert norm.weight.requires_grad and linear.weight.requires_grad
    biased = nets.build(replace(CONFIG, neck_bias=True)).neck
    assert biased[0].bias.requires_grad and not biased[1].bias.requires_grad
    shifted = nets.build(replace(CONFIG, neck_norm_bias=True)).neck
    assert shifted[0].bias is None and shifted[1].bias.requires_grad


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_the_neck_starts_from_xavier_s_distribution(init):
    torch.manual_seed(0)
    weight = nets.build(replace(CONFIG, dim=512, neck_init=init)).neck[0].weight
    deviation = (2 / sum(weight.shape)) ** 0.5
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.02 * deviation)
    beyond = (weight.abs() > 3**0.5 * deviation).float().mean().item()
    # a uniform distribution ends there, a normal one has 8.3 % beyond
    assert beyond == pytest.approx(0 if init == "uniform" else 0.0833, abs=0.005)


def test_the_power_of_the_pool_is_trained_only_if_the_config_says_so(net):
    def trained(net):
        named = net.pool.named_parameters()
        return [name.rpartition(".")[2] for name, p in named if p.requires_grad]

    assert trained(net) == []
    assert trained(nets.build(replace(CONFIG, pool_trainable=True))) == ["p"]


@torch.inference_mode()
def test_stages_are_pooled_as_the_string_says(images):
    net = nets.build(replace(CONFIG, pool="SM,G", neck="none")).eval()
    third, fourth = backbones.maps(net.backbone, images, 2)
    expected = torch.cat([spoc(third), mac(third), gem(fourth, 2.5)], dim=1)
    torch.testing.assert_close(net(images), expected)
    assert net.dim == expected.shape[1]


@torch.inference_mode()
def test_dolg_pools_the_third_and_the_fourth_stage(images):
    net = nets.build(replace(CONFIG, pool="dolg")).eval()
    maps = backbones.maps(net.backbone, images, 2)
    torch.testing.assert_close(net(images), net.neck(net.pool(maps)))
    assert net.neck[0].in_features == 2 * maps[0].shape[1]
    assert net(images).shape == (4, net.dim)


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["G", "GCSMRL", "G,G", "dolg"])
@pytest.mark.parametrize(
    "backbone",
    ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit3"],
)
def test_every_kind_of_backbone_is_pooled_at_any_aspect(backbone, pool):
    torch.manual_seed(0)
    net = nets.build(replace(CONFIG, backbone=backbone, pool=pool)).eval()
    for height, width in [(64, 64), (96, 64), (64, 128)]:
        images = torch.randn(2, 3, height, width)
        embedded = net(images)
        assert embedded.shape == (2, 8) and embedded.isfinite().all()
        assert not torch.allclose(embedded[0], embedded[1])


@torch.inference_mode()
def test_under_autocast_the_neck_is_in_float32(net, images):
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images)
        pooled = net.pool(backbones.maps(net.backbone, images, 1))
    assert half.dtype == torch.float32
    assert torch.equal(half, net.neck(pooled))


def test_the_backbone_has_the_stride_and_drop_path_of_the_config(images):
    net = nets.build(replace(CONFIG, stride=16, drop_path=0.25))
    (last,) = backbones.maps(net.backbone, images, 1)
    assert last.shape[-2:] == (4, 4)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.25)
    plain = nets.build(CONFIG)
    assert backbones.maps(plain.backbone, images, 1)[0].shape[-2:] == (2, 2)
    assert not any(isinstance(m, DropPath) and m.drop_prob for m in plain.modules())


@torch.inference_mode()
def test_a_backbone_that_must_know_the_size_is_told_it():
    spec = replace(SPEC, size=96)
    net = nets.build(replace(CONFIG, backbone="test_maxvit", input=spec)).eval()
    assert net(torch.randn(1, 3, 96, 96)).shape == (1, 8)


def test_no_classifier_is_left_in_the_backbone(net):
    assert not [key for key in net.state_dict() if "fc" in key or "classifier" in key]


def test_on_a_cpu_nothing_is_computed_in_half_precision():
    assert nets.half_precision(torch.device("cpu")) is None


# Pretrained weights


def test_a_network_is_random_unless_it_is_pretrained():
    first, second = nets.build(CONFIG), nets.build(CONFIG)
    weights = [each.backbone.conv1[0].weight for each in (first, second)]
    assert not torch.equal(*weights)


def test_pretrained_from_a_file_or_timm_s_hub_fills_the_backbone(tmp_path, monkeypatch):
    torch.manual_seed(3)
    whole = timm.create_model("test_resnet", num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    from_file = nets.build(replace(CONFIG, pretrained=str(tmp_path / "whole.pth")))

    create = timm.create_model

    def hub(name, pretrained=False, **options):  # there is no network here
        model = create(name, **options)
        if pretrained:
            model.load_state_dict(whole.state_dict(), strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", hub)
    from_hub = nets.build(replace(CONFIG, pretrained="timm"))
    for net in (from_file, from_hub):
        for key, value in net.backbone.state_dict().items():
            assert torch.equal(value, whole.state_dict()[key]), key


@pytest.mark.parametrize("name", ["fishnet99", "resnet101_ibn_a", "test_vit4"])
def test_pretrained_by_timm_is_refused_where_timm_would_stay_random(name):
    with pytest.raises(ValueError, match=f"^timm has no weights of {name}: set pre"):
        nets.build(NetConfig(name, "timm"))


def test_loading_a_saved_network_needs_no_pretrained_weights(tmp_path, net, images):
    net.config = replace(net.config, pretrained=str(tmp_path / "gone.pth"))
    loaded = nets.load(nets.save(net, tmp_path, {}))
    assert loaded.config == net.config


# How it is trained


@torch.no_grad()
def stirred(net, images):
    """No scale of exactly one, no bias of zero; norms that have seen `images`."""
    for parameter in net.parameters():
        parameter += 0.05 * torch.rand_like(parameter)
    for norm in norms(net).values():
        norm.momentum = 1.0
    net.train()(images)


def norms(net):
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    }


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_frozen_norms_stand_still_while_all_else_learns(images, backbone):
    torch.manual_seed(0)
    net = nets.build(
        replace(CONFIG, backbone=backbone, neck_norm_bias=True, prelu=True)
    )
    stirred(net, images)
    nets.freeze_norms(net)
    for step in (net, torch.nn.ModuleList([net])):
        step.train()
        assert net.training and net.neck.training
        assert not any(norm.training for norm in norms(net).values())
    frozen = copy.deepcopy(net.train())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(images).square().sum().backward()
    optimizer.step()
    before, after = frozen.state_dict(), net.state_dict()
    still = {key for key in before if torch.equal(before[key], after[key])}
    parts = {
        f"{n}.{key}" for n, norm in norms(net).items() for key in norm.state_dict()
    }
    assert still == parts | {"pool.layers.0.0.p"}
    assert "neck.1.bias" in parts and len(norms(net)) > 5
    assert not any(norm.training for norm in norms(frozen.train()).values())


@torch.no_grad()
def test_a_frozen_norm_computes_what_it_computes_in_eval_mode(net, images):
    expected = net(images)
    nets.freeze_norms(net)
    assert not net.training
    torch.testing.assert_close(net.train()(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_synchronised_norms_are_the_same_network(images, backbone):
    torch.manual_seed(0)
    net = nets.build(replace(CONFIG, backbone=backbone)).eval()
    expected, count, keys = net(images), len(norms(net)), net.state_dict().keys()
    nets.sync_norms(net)
    torch.testing.assert_close(net(images), expected)
    assert net.state_dict().keys() == keys
    assert len(norms(net)) == count
    for norm in norms(net).values():
        assert isinstance(norm, torch.nn.SyncBatchNorm)
    assert not net.neck[1].bias.requires_grad


@pytest.mark.parametrize("pool", ["G", "G,G"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_checkpointed_activations_are_fewer_and_change_no_gradient(
    images, backbone, pool
):
    def kept_bytes(net):
        kept = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.nbytes) or x, lambda x: x
        ):
            loss = net(images).square().sum()
        loss.backward()
        return sum(kept), [p.grad for p in net.parameters() if p.requires_grad]

    torch.manual_seed(0)
    plain = nets.build(replace(CONFIG, backbone=backbone, pool=pool)).train()
    light = copy.deepcopy(plain)
    nets.checkpoint_activations(light)
    (much, expected), (little, gradients) = kept_bytes(plain), kept_bytes(light)
    assert little < 0.8 * much
    for own, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, theirs)


def test_a_backbone_that_cannot_recompute_is_named():
    with pytest.raises(ValueError, match="^backbone selecsls42 cannot recompute its"):
        nets.checkpoint_activations(nets.build(NetConfig("selecsls42")))


# Saving and loading


@torch.inference_mode()
def test_a_saved_network_gives_the_same_embeddings(tmp_path, net, images):
    folder = nets.save(net.train(), tmp_path / "runs" / "toy" / "clean", {})
    loaded = nets.load(folder)
    assert not loaded.training
    assert loaded.config == CONFIG
    torch.testing.assert_close(loaded(images), net.eval()(images))
    assert not torch.equal(nets.build(CONFIG).eval()(images), net(images))


@torch.inference_mode()
@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "SMG,C", "pool_trainable": True},
        {"pool": "R,L"},
        {"pool": "dolg"},
        {"neck": "none"},
        {"neck_bias": True, "neck_norm_bias": True, "neck_init": "normal"},
        {"prelu": True, "dropout": 0.5},
        {"drop_path": 0.2, "stride": 16},
        {"backbone": "test_vit"},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_every_kind_of_network_gives_the_same_embeddings_when_loaded(
    tmp_path, images, fields
):
    torch.manual_seed(0)
    net = nets.build(replace(CONFIG, **fields))
    stirred(net, images)
    loaded = nets.load(nets.save(net, tmp_path, {}))
    assert loaded.config == net.config
    torch.testing.assert_close(loaded(images), net.eval()(images))
    asked = [
        {n for n, p in each.named_parameters() if p.requires_grad}
        for each in (net, loaded)
    ]
    assert asked[0] == asked[1]


class Nested(torch.nn.Module):
    """A network two wrappers deep."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner


def compiled(module):
    return torch.compile(module, backend="eager")


def inside(net):
    net.backbone = compiled(torch.nn.DataParallel(net.backbone))
    net.neck[0] = torch.nn.DataParallel(compiled(net.neck[0]))
    return net


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net.to(memory_format=torch.channels_last),
        compiled,
        lambda net: compiled(net.to(memory_format=torch.channels_last)),
        lambda net: Nested(compiled(Nested(net))),
        lambda net: compiled(torch.nn.DataParallel(net)),
        inside,
    ],
    ids=["channels last", "compiled", "both", "nested", "parallel", "inside"],
)
def test_a_saved_network_is_contiguous_and_has_its_own_names_however_it_was_wrapped(
    tmp_path, net, images, wrap
):
    own = {key: value.clone() for key, value in net.state_dict().items()}
    nets.save(wrap(net), tmp_path, {})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(own)
        for key, value in own.items():
            assert file.get_tensor(key).is_contiguous()
            assert torch.equal(file.get_tensor(key), value)
    assert nets.load(tmp_path).state_dict().keys() == own.keys()


@torch.no_grad()
def test_a_compiled_network_computes_the_same(net, images):
    torch.testing.assert_close(compiled(net)(images), net(images))


def test_a_module_that_is_called_module_keeps_its_name(tmp_path, net):
    net.backbone.extra = Nested(torch.nn.Linear(2, 2))
    nets.save(net, tmp_path, {})
    weights = load_file(tmp_path / "model.safetensors")
    assert "backbone.extra.module.weight" in weights


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_is_loaded_in_the_memory_format_asked_for(
    tmp_path, net, channels_last
):
    loaded = nets.load(nets.save(net, tmp_path, {}), channels_last=channels_last)
    weight = next(p for p in loaded.parameters() if p.ndim == 4 and p.shape[1] > 1)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert weight.is_contiguous(memory_format=form)
    assert weight.is_contiguous() != channels_last


def test_a_saved_network_is_two_files_and_says_what_it_saw(tmp_path, net):
    seen = {"a" * 64: "clean", "b" * 64: "c2x"}
    nets.save(net, tmp_path, seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.json",
        "model.safetensors",
    ]
    about = nets.describe(tmp_path)
    assert about["seen"] == seen
    assert about["dim"] == 8
    assert about["hash"] == files.sha256(tmp_path / "model.safetensors")
    assert about["kit"] == __version__
    weights, own = load_file(tmp_path / "model.safetensors"), net.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)


def test_saving_twice_gives_the_same_bytes(tmp_path, net):
    first, second = (
        nets.save(net, tmp_path / "1", {}),
        nets.save(net, tmp_path / "2", {}),
    )
    for name in ("model.safetensors", "model.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@torch.inference_mode()
def test_a_save_that_fails_leaves_the_old_network(tmp_path, net, images, monkeypatch):
    nets.save(net, tmp_path, {})
    expected = net(images)

    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kit.models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        nets.save(nets.build(CONFIG), tmp_path, {})
    torch.testing.assert_close(nets.load(tmp_path)(images), expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_that_is_killed_between_its_files_is_not_taken_for_a_whole_one(
    tmp_path, net, monkeypatch
):
    nets.save(net, tmp_path, {"a" * 64: "clean"})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write_json", killed)
        nets.save(nets.build(CONFIG), tmp_path, {"b" * 64: "c2x"})
    with pytest.raises(ValueError, match="model.safetensors"):
        nets.load(tmp_path)


# Refusals


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_weights_of_another_architecture_name_the_first_key(tmp_path, net):
    nets.save(net, tmp_path, {})
    about = files.read_json(tmp_path / "model.json")
    about["config"]["backbone"] = "test_efficientnet"
    checksums.write_manifest(tmp_path / "model.json", about)
    other = EmbeddingNet(replace(CONFIG, backbone="test_efficientnet"))
    ours = load_file(tmp_path / "model.safetensors")
    first = next(key for key in other.state_dict() if key not in ours)
    with pytest.raises(ValueError, match=re.escape(f"no {first}; ")) as caught:
        nets.load(tmp_path)
    assert "another architecture" in one_line(caught)


def test_an_embedding_of_another_length_names_its_key(tmp_path, net):
    nets.save(net, tmp_path, {})
    about = files.read_json(tmp_path / "model.json")
    about["config"]["dim"] = 16
    checksums.write_manifest(tmp_path / "model.json", about)
    expected = r"neck.0.weight is \(8, \d+\), the network's is \(16, \d+\)"
    with pytest.raises(ValueError, match=expected) as caught:
        nets.load(tmp_path)
    one_line(caught)


def test_a_model_json_changed_by_hand_is_refused_by_name(tmp_path, net):
    nets.save(net, tmp_path, {"a" * 64: "clean"})
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"clean"', '"cleen"'))
    with pytest.raises(checksums.Damaged, match="model.json: damaged.*02_train"):
        nets.load(tmp_path)


def test_a_missing_model_says_how_to_make_one(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="no model in .*02_train_stage"):
        nets.load(tmp_path / "nowhere")
    nets.save(net, tmp_path, {})
    (tmp_path / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match="no model in .*02_train_stage"):
        nets.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"config": {"backb', b"\0" * 512, b"\xff\xfe"],
    ids=["empty", "cut short", "zeros", "not text"],
)
def test_a_model_json_that_is_garbage_is_named(tmp_path, net, content):
    nets.save(net, tmp_path, {})
    (tmp_path / "model.json").write_bytes(content)
    path = re.escape(str(tmp_path / "model.json"))
    with pytest.raises(ValueError, match=f"^{path}: not JSON") as caught:
        nets.load(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_weights_that_are_cut_short_are_named(tmp_path, net, left):
    nets.save(net, tmp_path, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} is not the file"
    ) as caught:
        nets.load(tmp_path)
    assert "02_train" in one_line(caught)


def test_weights_that_are_missing_are_named(tmp_path, net):
    nets.save(net, tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is not the file") as caught:
        nets.load(tmp_path)
    one_line(caught)
