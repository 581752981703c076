"""The kit's wheel works from where it lies, and others are those of Kaggle's Python."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from kit import files
from kit.data import lists, sources
from kit.data.inputs import InputSpec
from kit.features import store
from kit.features.extract import Job
from kit.kaggle import wheels
from kit.models import net as nets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return wheels.make(ROOT, tmp_path_factory.mktemp("wheel"))


def python(wheel, arguments, folder):
    """A process that knows the kit by the wheel alone."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Five pictures and a small network."""
    data = tmp_path_factory.mktemp("data")
    for number in range(5):
        picture = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        cv2.imwrite(str(data / f"{number}.jpg"), picture)
    lines = ["path,label", *(f"{number}.jpg,a" for number in range(5))]
    (data / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(data / "table.csv", data)
    lists.build(facts, data, data / "lists", sizes=False)
    spec = InputSpec(size=32)
    net = nets.build(nets.NetConfig("test_resnet", dim=8, input=spec))
    nets.save(net, data / "runs" / "clean", {"f" * 64: "clean"})
    where = data / "lists", "full", data, data / "features"
    return Job(data / "runs", ("clean",), *where, workers=1)


def test_the_wheel_holds_the_kit_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kit", "landmark_kit-0.1.0.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("kit/**/*.py")}
    assert {name for name in names if name.startswith("kit/")} == modules


def test_equal_sources_make_equal_wheels(wheel, tmp_path):
    for name in wheels.SOURCES:  # copies are newer
        wheels._copy(ROOT / name, tmp_path / name)
    again = wheels.make(tmp_path, tmp_path / "out")
    assert again.name == wheel.name and again.read_bytes() == wheel.read_bytes()


def test_building_leaves_nothing_beside_the_sources(wheel):
    assert not (ROOT / "landmark_kit.egg-info").exists()
    assert not (ROOT / "build" / "lib").exists()


def test_the_kit_is_imported_from_the_wheel_where_it_lies(wheel, tmp_path):
    code = "import kit.features.extract, kit.kaggle.flat; print(kit.__file__)"
    done = python(wheel, ["-c", code], tmp_path)
    assert done.stdout.strip() == f"{wheel}/kit/__init__.py", done.stderr


def test_features_are_extracted_by_the_wheel_where_it_lies(wheel, job, tmp_path):
    done = python(wheel, ["-m", "kit.features.extract", str(job.write())], tmp_path)
    assert done.returncode == 0, done.stderr
    features = store.load(job.folder)
    assert features.vectors.shape == (5, 8) and features.vectors.any(axis=1).all()


@pytest.mark.slow
def test_ranks_are_launched_by_the_wheel_where_it_lies(wheel, job, tmp_path):
    path = files.write_json(tmp_path / "job.json", json.loads(job.write().read_text()))
    code = (
        "from pathlib import Path\nfrom kit.launch import launch\n"
        f"launch('kit.features.extract', [{str(path)!r}], processes=2, logs=Path('logs'))"
    )
    about = files.read_json(path) | {"features": str(tmp_path / "features")}
    files.write_json(path, about)
    done = python(wheel, ["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(store.load(tmp_path / "features" / "clean" / "full")) == 5


@pytest.mark.parametrize("name", wheels.SOURCES)
def test_without_sources_no_wheel_is_made(tmp_path, name):
    for other in set(wheels.SOURCES) - {name}:
        (tmp_path / other).mkdir()
    with pytest.raises(FileNotFoundError, match=f"no .*{name}; .* from a checkout"):
        wheels.make(tmp_path, tmp_path / "out")


def checkout(folder, package):
    """A project of one package that calls itself landmark-kit."""
    for name in ("README.md", "LICENSE"):
        (folder / name).write_text("text")
    (folder / "kit").mkdir()
    (folder / "kit" / "__init__.py").touch()
    (folder / "pyproject.toml").write_text(package)
    return folder


def test_a_wheel_of_other_things_is_refused(tmp_path):
    text = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "landmark-kit"
version = "1"
[tool.setuptools]
packages = ["kit"]
data-files = {"kit" = ["LICENSE"]}
"""
    with pytest.raises(ValueError, match="holds .*data, .*kit.*, not kit alone"):
        wheels.make(checkout(tmp_path, text), tmp_path / "out")


def test_what_pip_says_last_is_told_when_it_fails(tmp_path):
    text = '[project]\nname = "landmark-kit"\n'
    with pytest.raises(RuntimeError, match="^pip wheel failed: [^\n]+$"):
        wheels.make(checkout(tmp_path, text), tmp_path / "out")


def test_pip_is_asked_for_wheels_of_kaggles_python():
    said = wheels.download_arguments(["faiss-gpu", "six==1.17.0"], Path("wheels"))
    assert said[0] == "download" and said[-2:] == ["faiss-gpu", "six==1.17.0"]
    text = " ".join(said)
    for words in (
        "--only-binary=:all:",
        "--no-deps",
        "--implementation cp",
        "--python-version 312",
        "--platform manylinux_2_28_x86_64",
        "--dest wheels",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["", "--pre", "-r"])
def test_an_option_is_no_package(name):
    with pytest.raises(ValueError, match="is no package's name"):
        wheels.download_arguments([name], Path("wheels"))


@pytest.mark.slow
def test_a_wheel_is_downloaded(tmp_path):
    try:
        (found,) = wheels.download(["six"], tmp_path / "wheels")
    except RuntimeError as error:
        pytest.skip(f"no registry answers: {error}")
    assert found.name.startswith("six-") and zipfile.is_zipfile(found)


# On Kaggle


def test_what_travelled_beside_the_kit_is_installed_without_a_network(
    tmp_path, monkeypatch
):
    mount = tmp_path / "mount"
    mount.mkdir()
    about = "small_thing-1.0.dist-info"
    head = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(mount / "small_thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("small_thing.py", "told = 7\n")
        archive.writestr(f"{about}/WHEEL", head)
        archive.writestr(f"{about}/METADATA", "Name: small-thing\nVersion: 1.0\n")
        archive.writestr(f"{about}/RECORD", "")
    (mount / "landmark_kit-0.1.0-py3-none-any.whl").write_bytes(b"is imported as it is")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("PYTHONPATH", "before")
    site = tmp_path / "site"
    for _ in range(2):  # again in the same session
        done = wheels.install([tmp_path, mount], site)
        assert done == ["small_thing-1.0-py3-none-any.whl"]
    assert importlib.import_module("small_thing").told == 7
    code = "import small_thing; print(small_thing.told)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"7\n"
    assert os.environ["PYTHONPATH"].endswith(f"{os.pathsep}before")


def test_without_other_wheels_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = sys.path.copy()
    (tmp_path / "landmark_kit-0.1.0-py3-none-any.whl").touch()
    assert wheels.install([tmp_path], tmp_path / "site") == []
    assert sys.path == before and not (tmp_path / "site").exists()
