import json
import re
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from kit import __version__, files
from kit.data.inputs import InputSpec
from kit.models import net as nets
from kit.models.net import EmbeddingNet, NetConfig
from kit.models.pooling import gem

SPEC = InputSpec(
    size=64, resize="crop", colour="bgr", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
CONFIG = NetConfig("test_resnet", pool_p=2.5, dim=8, input=SPEC)


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


@pytest.mark.parametrize(
    "config",
    [
        NetConfig(),
        CONFIG,
        NetConfig(
            "resnet10t", "lite0", 1.5, True, "none", 7, True, replace(SPEC, size=96)
        ),
    ],
)
def test_a_config_survives_json(config):
    text = json.dumps(asdict(config))
    assert NetConfig.from_dict(json.loads(text)) == config


def test_every_field_of_a_config_is_in_model_json(tmp_path, net):
    about = files.read_json(nets.save(net, tmp_path, {}) / "model.json")
    assert about["config"] == json.loads(json.dumps(asdict(CONFIG)))
    assert about["config"]["input"] == {
        "size": 64,
        "resize": "crop",
        "colour": "bgr",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
    }


def test_an_unknown_neck_or_input_rule_is_refused():
    with pytest.raises(ValueError, match="^neck 'gap' is not one of bn, none$"):
        NetConfig(neck="gap")
    with pytest.raises(ValueError, match="^colour 'gbr' is not one of rgb, bgr$"):
        NetConfig.from_dict({"backbone": "test_resnet", "input": {"colour": "gbr"}})


def test_an_unknown_backbone_is_refused_with_names_that_are_close():
    with pytest.raises(ValueError, match=r"^backbone 'resnet5O' .*\bresnet50\b"):
        nets.build(NetConfig("resnet5O"))
    with pytest.raises(ValueError, match="^backbone 'qqqq' is not one of timm's$"):
        nets.build(NetConfig("qqqq"))


# The network


@torch.inference_mode()
def test_without_a_neck_the_embedding_is_the_pooled_feature_map(images):
    net = nets.build(replace(CONFIG, neck="none")).eval()
    expected = gem(net.backbone.forward_features(images), 2.5)
    torch.testing.assert_close(net(images), expected)
    assert net.dim == expected.shape[1] == net.backbone.num_features


@torch.inference_mode()
def test_the_neck_is_a_linear_layer_and_then_a_batch_norm(net, images):
    pooled = gem(net.backbone.forward_features(images), 2.5)
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


def test_the_batch_norm_of_the_neck_has_no_bias_to_train(net):
    linear, norm = net.neck
    assert linear.bias is None
    assert not norm.bias.requires_grad and not norm.bias.any()
    assert norm.weight.requires_grad and linear.weight.requires_grad
    biased = nets.build(replace(CONFIG, neck_bias=True))
    assert biased.neck[0].bias.requires_grad


def test_the_power_of_the_pool_is_trained_only_if_the_config_says_so(net):
    assert not net.pool.p.requires_grad
    assert nets.build(replace(CONFIG, pool_trainable=True)).pool.p.requires_grad


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


def test_loading_a_saved_network_needs_no_pretrained_weights(tmp_path, net, images):
    net.config = replace(net.config, pretrained=str(tmp_path / "gone.pth"))
    loaded = nets.load(nets.save(net, tmp_path, {}))
    assert loaded.config == net.config


# Saving and loading


@torch.inference_mode()
def test_a_saved_network_gives_the_same_embeddings(tmp_path, net, images):
    folder = nets.save(net.train(), tmp_path / "runs" / "toy" / "clean", {})
    loaded = nets.load(folder)
    assert not loaded.training
    assert loaded.config == CONFIG
    torch.testing.assert_close(loaded(images), net.eval()(images))
    assert not torch.equal(nets.build(CONFIG).eval()(images), net(images))


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
    files.write_json(tmp_path / "model.json", about)
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
    files.write_json(tmp_path / "model.json", about)
    expected = r"neck.0.weight is \(8, \d+\), the network's is \(16, \d+\)"
    with pytest.raises(ValueError, match=expected) as caught:
        nets.load(tmp_path)
    one_line(caught)


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
    assert "run the stage again" in one_line(caught)


def test_weights_that_are_missing_are_named(tmp_path, net):
    nets.save(net, tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is not the file") as caught:
        nets.load(tmp_path)
    one_line(caught)
