import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.kaggle import runtime
from kit.models import net as nets
from kit.models import references

ROOT = Path(references.__file__).resolve().parents[2]
KAGGLE = "kaggle:alice/landmarks/pyTorch/c2x/3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A machine with neither mounts nor a cache."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path / "kaggle"))


def saved(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in references.FILES:
        (folder / name).write_text(name)
    return folder


def cached(hub: Path, ref: str = "main") -> Path:
    home = hub / "models--alice--landmarks"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / ref).write_text(COMMIT)
    return saved(home / "snapshots" / COMMIT)


@pytest.mark.parametrize("path", ["runs/toy/c2x", "/data/kaggle:odd", "hf"])
def test_a_path_is_itself(path):
    assert references.folder(path) == references.folder(Path(path)) == Path(path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_of_kaggle_is_found_where_it_is_mounted(place):
    parts = KAGGLE.removeprefix("kaggle:").split("/")
    folder = saved(references.mounts(*parts)[place])
    assert references.folder(KAGGLE) == folder
    assert folder == runtime.find("model", "/".join(parts))


def test_mounts_are_those_that_the_runtime_knows(monkeypatch):
    parts = KAGGLE.removeprefix("kaggle:").split("/")
    for root in ("", "/elsewhere"):
        monkeypatch.setenv("KIT_KAGGLE_ROOT", root)
        assert references.mounts(*parts) == runtime.candidates("model", "/".join(parts))


@pytest.mark.parametrize(
    ("variables", "hub"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "x"}, "x/huggingface/hub"),
        ({"HF_HOME": "h", "XDG_CACHE_HOME": "x"}, "h/hub"),
        ({"HF_HUB_CACHE": "c", "HF_HOME": "h"}, "c"),
    ],
)
def test_a_model_of_the_hub_is_found_in_its_cache(
    tmp_path, monkeypatch, variables, hub
):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    folder = cached(tmp_path / hub)
    assert references.folder("hf:alice/landmarks") == folder
    assert references.folder(f"hf:alice/landmarks@{COMMIT}") == folder


def test_the_cache_is_where_the_hub_itself_looks(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variables in ({}, {"HF_HOME": "/h"}, {"HF_HUB_CACHE": "/c"}):
        environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | variables
        ours = "from kit.models import references; print(references.cache())"
        both = [
            subprocess.run(
                [sys.executable, "-c", each],
                env={"PATH": os.environ["PATH"]} | environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for each in (code, ours)
        ]
        assert both[0] == both[1]


def test_a_tag_or_a_branch_is_another_revision(tmp_path):
    folder = cached(tmp_path / "home/.cache/huggingface/hub", "v1")
    assert references.folder("hf:alice/landmarks@v1") == folder
    with pytest.raises(FileNotFoundError, match="hf download alice/landmarks$"):
        references.folder("hf:alice/landmarks")
    with pytest.raises(FileNotFoundError, match="landmarks --revision v2$"):
        references.folder("hf:alice/landmarks@v2")


def test_what_is_not_here_is_refused_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        references.folder(KAGGLE)
    said = str(error.value)
    assert said.startswith(f"{KAGGLE} is not on this machine (looked in {tmp_path}")
    assert said.endswith(
        "run: kaggle models variations versions download "
        "alice/landmarks/pyTorch/c2x/3 --untar -p FOLDER, then give FOLDER's path"
    )
    assert "\n" not in said


def test_a_download_that_is_not_whole_is_not_there(tmp_path):
    folder = cached(tmp_path / "home/.cache/huggingface/hub")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is not on this machine"):
        references.folder("hf:alice/landmarks")


@pytest.mark.parametrize(
    "reference",
    [
        *("kaggle:alice/landmarks", "kaggle:a/b/c/d/../e", "kaggle:a/b/c//1"),
        *("hf:landmarks", "hf:a/b/c", "hf:a/..", "hf:"),
    ],
)
def test_a_reference_of_another_form_is_refused(reference):
    with pytest.raises(ValueError, match="is not of the form (kaggle:o|hf:o)wner/"):
        references.folder(reference)


def test_a_network_is_loaded_by_its_reference(tmp_path):
    torch.manual_seed(0)
    net = nets.build(nets.NetConfig("test_resnet", dim=8))
    parts = KAGGLE.removeprefix("kaggle:").split("/")
    nets.save(net, references.mounts(*parts)[0], seen={})
    loaded = nets.load(KAGGLE).state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(loaded[name], value)
