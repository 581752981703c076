"""Wheels that travel: the kit's own from a checkout, and what Kaggle's image lacks; and there."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PYTHON = "312"  # of Kaggle's image, whatever runs here
# wheels say the oldest C library they need; pip takes no older name for a newer one
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "kit")  # of the kit's wheel
KIT = "landmark_kit-"  # how the kit's own begins
EPOCH = "315532800"  # 1980, the first year a zip can name: equal sources, equal wheels


def make(checkout: Path, to: Path) -> Path:
    """The kit's wheel in `to`; needs no network, but setuptools as requirements.txt has it."""
    for name in SOURCES:
        if not (checkout / name).exists():
            raise FileNotFoundError(
                f"no {checkout / name}; the kit's wheel is built from a checkout"
            )
    with tempfile.TemporaryDirectory() as folder:  # setuptools writes beside sources
        copy = Path(folder) / "checkout"
        copy.mkdir()
        for name in SOURCES:
            _copy(checkout / name, copy / name)
        _pip(
            ["wheel", "--no-deps", "--no-build-isolation", "--no-index"]
            + ["--wheel-dir", str(to), str(copy)]
        )
    (wheel,) = to.glob(f"{KIT}*.whl")
    _refuse_strangers(wheel)
    return wheel


def download(names: Sequence[str], to: Path) -> list[Path]:
    """Wheels of packages for Kaggle's Python in `to`, without what these depend on.

    names: as pip takes them, such as faiss-gpu or faiss-gpu==1.15.1.
    """
    to.mkdir(parents=True, exist_ok=True)
    _pip(download_arguments(names, to))
    return sorted(to.glob("*.whl"))


def install(mounts: Sequence[Path], to: Path) -> list[str]:
    """Installs what travelled beside the kit into `to`, for this process and those it starts.

    Needs no network; returns the names of the wheels.
    """
    found = [wheel for mount in mounts for wheel in sorted(mount.glob("*.whl"))]
    others = [wheel for wheel in found if not wheel.name.startswith(KIT)]
    if others:
        options = ["--no-index", "--no-deps", "--upgrade", "--target", str(to)]
        _pip(["install", *options, *map(str, others)])
        sys.path.insert(0, str(to))
        paths = (str(to), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return [wheel.name for wheel in others]


def download_arguments(names: Sequence[str], to: Path) -> list[str]:
    for name in names:
        if not name or name.startswith("-"):
            raise ValueError(f"{name!r} is no package's name")
    platforms = [word for it in PLATFORMS for word in ("--platform", it)]
    return [
        *("download", "--only-binary=:all:", "--no-deps", "--implementation", "cp"),
        *("--python-version", PYTHON, *platforms, "--dest", str(to), *names),
    ]


def _copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, to)


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        said = errors[-1] if errors else f"code {done.returncode}"
        raise RuntimeError(f"pip {arguments[0]} failed: {said}")


def _refuse_strangers(wheel: Path) -> None:
    """Kaggle's image has folders of its own on the path: a wheel brings `kit` and no other."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    strange = {top for top in tops if top != "kit" and not top.endswith(".dist-info")}
    if strange or "kit" not in tops:
        raise ValueError(f"{wheel.name} holds {', '.join(sorted(tops))}, not kit alone")
