import json
import logging
import sys
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kit import files
from kit.data.inputs import InputSpec
from kit.models import export
from kit.models import net as nets
from kit.models.net import NetConfig

CONFIG = NetConfig("test_resnet", pool_p=2.5, dim=8, input=InputSpec(64))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(config, folder):
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    net = nets.build(config)
    with torch.no_grad():
        net.train()(3 * torch.randn(4, 3, 64, 64) + 1)
    return nets.save(net, folder, {"a" * 64: "clean"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(CONFIG, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    return export.onnx(folder, tmp_path_factory.mktemp("out") / "net.onnx")


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def assert_same(path, folder, shape):
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    (embeddings,) = session(path).run(None, {"images": images.numpy()})
    expected = nets.load(folder)(images).numpy()
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01 and len(np.unique(expected[:, 0])) == len(images)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnxruntime_computes_what_torch_does_for_any_batch(folder, exported, batch):
    assert_same(exported, folder, (batch, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, pool, size",
    [
        ("test_efficientnet", "dolg", None),
        ("test_vit", "G", (64, 128)),
    ],
)
def test_dolg_and_token_networks_can_be_exported(tmp_path, backbone, pool, size):
    config = NetConfig(backbone, pool=pool, dim=8, prelu=True, input=InputSpec(64))
    folder = saved(config, tmp_path)
    path = export.onnx(folder, tmp_path / "out" / "net.onnx", size)
    assert_same(path, folder, (3, 3, *(size or (64, 64))))


def test_the_file_says_what_goes_in_and_comes_out(folder, exported):
    (images,), (embeddings,) = (
        session(exported).get_inputs(),
        session(exported).get_outputs(),
    )
    assert (images.name, images.type) == ("images", "tensor(float)")
    assert isinstance(images.shape[0], str) and images.shape[1:] == [3, 64, 64]
    assert (embeddings.name, embeddings.type) == ("embeddings", "tensor(float)")
    assert embeddings.shape == [images.shape[0], 8]
    facts = session(exported).get_modelmeta().custom_metadata_map
    assert json.loads(facts["config"]) == json.loads(json.dumps(asdict(CONFIG)))
    assert facts["weights"] == files.sha256(folder / "model.safetensors")


def test_the_file_is_whole_and_alone(exported):
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    assert [path.name for path in exported.parent.iterdir()] == ["net.onnx"]


def test_the_difference_is_the_largest_of_any_number(tmp_path, folder, exported):
    other = nets.load(folder)
    with torch.no_grad():
        other.neck[1].bias[3] += 0.5
        other.neck[1].bias[5] -= 0.25
    images = torch.randn(3, 3, 64, 64)
    assert export.difference(other, exported, images) == pytest.approx(0.5, abs=1e-3)
    assert export.difference(nets.load(folder), exported, images) < 1e-4


def test_a_network_that_gives_no_numbers_is_not_written(tmp_path):
    folder = saved(CONFIG, tmp_path / "stage")
    net = nets.load(folder)
    with torch.no_grad():
        net.neck[0].weight[0, 0] = torch.nan
    nets.save(net, folder, {})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="differ from torch's by nan, more than 0.001"):
        export.onnx(folder, out / "net.onnx")
    assert list(out.iterdir()) == []


def test_weights_beyond_what_onnx_holds_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ValueError, match="do not fit in an ONNX file's 2 GiB"):
        export.onnx(folder, tmp_path / "net.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install .*{package}"):
        export.onnx(folder, tmp_path / "net.onnx")


def test_the_command_writes_any_pool_and_aspect_and_says_how_exact_it_is(
    tmp_path, caplog
):
    folder = saved(replace(CONFIG, pool="SMC,RL", prelu=True), tmp_path / "stage")
    out = tmp_path / "tall.onnx"
    with caplog.at_level(logging.INFO, logger="kit.models.export"):
        export.main([str(folder), str(out), "--size", "96", "64"])
    (line,) = [r.getMessage() for r in caplog.records if r.name == export.__name__]
    said, _, number = line.rpartition(" ")
    assert said == f"{out}: largest difference to torch"
    assert 0 < float(number) < 1e-4
    assert_same(out, folder, (2, 3, 96, 64))


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no model in"):
        export.main([str(tmp_path), str(tmp_path / "net.onnx")])
