"""A small build that Kaggle would take, for tests to spoil."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kit.kaggle import manifest

COMPETITION = "landmark-retrieval-2021"
SOURCES = ("# Rank\n", "print('ranking')\nprint('written')")


def make(build: Path, owner: str = "alice") -> Path:
    """Datasets landmark-weights (two files) and landmark-features (three), and a kernel."""
    random = np.random.default_rng(0)
    for name, parts in {
        "weights": {"model.safetensors": 5000, "model.json": 40},
        "features": {"part-0.bin": 3000, "part-1.bin": 3000, "ids.bin": 100},
    }.items():
        folder = build / name
        folder.mkdir(parents=True)
        for part, size in parts.items():
            (folder / part).write_bytes(random.bytes(size))
        metadata = {
            "id": f"{owner}/landmark-{name}",
            "title": f"Landmark {name}",
            "licenses": [{"name": "CC0-1.0"}],
        }
        (folder / manifest.DATASET).write_text(json.dumps(metadata))
    folder = build / manifest.SUBMISSION
    folder.mkdir()
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    first, second = SOURCES
    cells = [
        {"cell_type": "markdown", "id": "top", "metadata": {}, "source": [first]},
        cell | {"id": "rank", "source": second.splitlines(keepends=True)},
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernelspec}}
    notebook |= {"nbformat": 4, "nbformat_minor": 5}
    (folder / "submission.ipynb").write_text(json.dumps(notebook))
    metadata = {
        "id": f"{owner}/landmark-submission",
        "title": "Landmark submission",
        "code_file": "submission.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [f"{owner}/landmark-weights", f"{owner}/landmark-features"],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
        "model_sources": [],
    }
    (folder / manifest.KERNEL).write_text(json.dumps(metadata))
    manifest.write(build, COMPETITION)
    return build


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; None takes one away."""
    value = json.loads(path.read_text()) | fields
    kept = {name: it for name, it in value.items() if it is not None}
    path.write_text(json.dumps(kept))
