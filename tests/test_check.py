"""One flipped byte in every kind of file of a finished work folder."""

import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from kit import check, checksums, files, pipeline
from kit.answers import gain_table
from kit.answers.cleaning import verified
from kit.data import exclusions, lists, sources, tables, tars
from kit.features import graph, screen, store
from kit.models import net as nets
from kit.pipeline import Step
from kit.rerank import chain
from kit.rerank.local import cache
from kit.rerank.local.features import Sift
from kit.training import checkpoints

ROOT = Path(__file__).resolve().parents[1]
IDS = np.array([f"{number:016x}" for number in range(20)])
CONFIG = nets.NetConfig(backbone="test_efficientnet", dim=8)
STATE = {"net": {"weight": torch.ones(64)}, "step": 3}


def unit_vectors(seed: int) -> np.ndarray:
    """The third image was unreadable."""
    found = np.random.default_rng(seed).standard_normal((20, 16))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    found[2] = 0
    return found.astype(np.float16)


def write_store(folder: Path, model: str, seed: int) -> Path:
    about = {"model": {"name": model, "hash": model * 9}, "seen": {}}
    about["list"] = {"name": "index", "hash": "b" * 64}
    store.create(folder, IDS, 16, 8, about)
    writer = store.Writer(folder)
    for block in range(3):
        writer.write(block, unit_vectors(seed)[block * 8 : block * 8 + 8])
    store.finish(folder)
    return folder


def tune(work: Path) -> None:
    """What 04_tune_rerank leaves."""
    chain.save(chain.Chain({"clean": 1.0}), work / "answers/toy/chain.json")
    gain_table.write(work / "answers/toy/gains.csv", [("search", 0.1, 0.2, "x")])


def steps_of(work: Path, folder: Path) -> list[Step]:
    notebook = folder / "04.ipynb"
    cell = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": spec}), notebook
    )
    outputs = work / "answers/toy/chain.json", work / "answers/toy/gains.csv"
    return [Step("04_tune_rerank", notebook, outputs=outputs)]


@pytest.fixture
def work(gldv2, tmp_path, monkeypatch) -> Path:
    """A finished work folder, each kind of file by its owner's writer."""
    work = tmp_path / "work"
    facts = sources.read(gldv2)
    lists.build(facts, gldv2, work / "lists", sizes=False)
    head = {"weight": torch.ones(4, 8)}
    about = {"fingerprint": "f" * 64}
    checkpoints.save_result(
        work / "runs/toy/clean", nets.EmbeddingNet(CONFIG), head, about, {}
    )
    nets.save(nets.EmbeddingNet(CONFIG), work / "runs/toy/untrained", {})
    checkpoints.save_state(work / "runs/toy/c2x", "f" * 64, STATE)
    for seed, model in enumerate(("clean", "untrained")):
        folder = write_store(work / "features/toy" / model / "index", model, seed)
        screen.build(folder)
        graph.build(graph.Job(folder, work / "graph/toy" / model / "index", 3))
    images = {"a": np.zeros((64, 64), np.uint8), "b": np.eye(64, dtype=np.uint8) * 255}
    cache.fill(
        work / "features/toy/local/sift/query/index", list(images), images.get, Sift()
    )
    pairs = work / "cleaning/toy/sift"
    there = verified.begin(pairs, {"list": "full"})
    np.save(pairs / "candidates.npy", np.array([[1], [0]], np.int32))
    verified.save(pairs, 0, np.array([[0, 1, 9, 3]], np.int32), [])
    verified.finish(pairs, there, 1)
    exclusions.write(
        work / "exclusions.csv", [exclusions.Exclusion(IDS[0], "near", "b")], {}
    )
    data = work / "shards"
    data.mkdir()
    (data / "a.jpg").write_bytes(b"a" * 100)
    with tarfile.open(data / "images_000.tar", "w") as archive:
        archive.add(data / "a.jpg", "0/a.jpg")
    (data / "a.jpg").unlink()
    tars.index(data)

    def execute(step, output):
        tune(work)
        output.write_bytes(step.notebook.read_bytes())
        return ""

    monkeypatch.setattr(pipeline, "_execute", execute)
    pipeline.run(steps_of(work, tmp_path), work / "pipeline-toy")
    return work


STEPS = {
    "lists/*": "00_image_lists",
    "runs/toy/clean/*": "02_train_clean",
    "runs/toy/c2x/resume/state.pt": "02_train_c2x",
    "runs/toy/untrained/*": "03_features_untrained",
    "features/toy/clean/index/[!s]*": "03_features_trained",
    "features/toy/untrained/index/[!s]*": "03_features_untrained",
    "features/toy/*/index/screen.*": "kit.features.screen",
    "features/toy/local/**/*": "04_tune_rerank",
    "graph/toy/clean/index/*": "03_features_trained",
    "graph/toy/untrained/index/*": "03_features_untrained",
    "cleaning/toy/sift/*": "01_clean_labels",
    "answers/toy/*": "04_tune_rerank",
    "pipeline-toy/*": "04_tune_rerank",
    "exclusions.*": "kit.answers.audit",
    "shards/tar_index/*": "kit.data.tars",
}


def kinds(work: Path) -> dict[Path, str]:
    """Each file of the folder, and what makes it again."""
    return {
        path: step
        for form, step in STEPS.items()
        for path in sorted(work.glob(form))
        if path.is_file() and path.name[0] != "." and path.name != "job.json"
    }


def flip(data: bytes) -> bytes:
    """A bit of the byte in the middle, or of the next one that is not white space."""
    at = next(
        n for n in range(len(data) // 2, len(data)) if not data[n : n + 1].isspace()
    )
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_flipped_byte_in_each_kind_of_file_is_named_with_its_step(work):
    assert check.check_folder(work).problems == {}
    found = kinds(work)
    assert len(found) >= 60
    for path, step in found.items():
        whole = path.read_bytes()
        for bad in (flip(whole), whole[: len(whole) // 2], bytes(len(whole))):
            path.write_bytes(bad)
            problems = check.check_folder(work).problems
            assert path in problems, path
            assert step in problems[path], problems[path]
        path.unlink()
        if path.suffix != ".pt" and path.name not in ("model.json", "stage.json"):
            assert check.check_folder(work).problems or path.suffix == ".json", path
        path.write_bytes(whole)
    assert check.check_folder(work).problems == {}


READERS = {
    "lists/full.*": lambda work: lists.load(work / "lists", "full"),
    "lists/solution.*": lambda work: tables.read_solution(work / "lists/solution.csv"),
    "runs/toy/untrained/*": lambda work: nets.load(work / "runs/toy/untrained"),
    "runs/toy/clean/*.*": lambda work: checkpoints.hand_over(
        work / "runs/toy/clean", nets.EmbeddingNet(CONFIG), None
    ),
    "runs/toy/c2x/resume/*": lambda work: checkpoints.load_state(
        work / "runs/toy/c2x", "f" * 64
    ),
    "features/toy/clean/index/[imv]*": lambda work: store.load(
        work / "features/toy/clean/index"
    ),
    "features/toy/clean/index/screen.*": lambda work: screen.of(
        store.load(work / "features/toy/clean/index")
    ),
    "graph/toy/clean/index/[mrs]*": lambda work: graph.load(
        work / "graph/toy/clean/index"
    ),
    "features/toy/local/sift/query/index/*": lambda work: cache.Cache(
        work / "features/toy/local/sift/query/index"
    )[1],
    "cleaning/toy/sift/*": lambda work: list(
        verified.Verified(work / "cleaning/toy/sift").blocks()
    ),
    "exclusions.*": lambda work: exclusions.read(work / "exclusions.csv"),
    "shards/tar_index/*": lambda work: tars.Index(work / "shards"),
}


def test_a_damaged_file_is_refused_by_its_reader_by_name(work):
    count = 0
    for form, read in READERS.items():
        read(work)
        for path in sorted(work.glob(form)):
            if path.is_dir() or path.name in (".lock", "job.json"):
                continue
            whole, count = path.read_bytes(), count + 1
            for bad in (flip(whole), whole[: len(whole) // 2], bytes(len(whole)), b""):
                path.write_bytes(bad)
                with pytest.raises((ValueError, OSError)) as caught:
                    read(work)
                # a tar index is named as a whole
                assert path.name in str(caught.value) or path.parent.name in str(
                    caught.value
                )
                assert "\n" not in str(caught.value)
            path.write_bytes(whole)
        read(work)
    assert count >= 28


@pytest.mark.parametrize(
    "name", ["features/toy/{}/index/vectors.npy", "graph/toy/{}/index/rows.npy"]
)
def test_another_model_s_file_of_the_same_shape_is_named(work, name):
    ours, theirs = (work / name.format(model) for model in ("clean", "untrained"))
    ours.write_bytes(theirs.read_bytes())
    assert list(check.check_folder(work).problems) == [ours]
    with pytest.raises(checksums.Damaged, match=ours.name):
        (store if ours.name == "vectors.npy" else graph).load(ours.parent)


def test_zero_rows_that_are_not_unreadable_are_named(work):
    """As a writer without checks would leave them: the checksum is that of the zeros."""
    folder = work / "features/toy/clean/index"
    vectors = np.load(folder / "vectors.npy")
    vectors[7] = 0
    np.save(folder / "vectors.npy", vectors)
    about = files.read_json(folder / "manifest.json")
    about["checksums"] = checksums.compute_checksums(folder, store.FILES)
    checksums.write_manifest(folder / "manifest.json", about)
    told = check.check_folder(work).problems[folder / "vectors.npy"]
    assert "2 rows of zeros, 1 unreadable" in told


def test_a_changed_output_makes_its_step_stale_and_the_step_repairs_it(
    work, tmp_path, capsys
):
    path, folder = work / "answers/toy/chain.json", work / "pipeline-toy"
    steps = steps_of(work, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(flip(whole))
    (status,) = pipeline.status(steps, folder)
    told = "answers/toy/chain.json changed since 04_tune_rerank wrote it"
    assert (status.state, status.why) == ("stale", told)
    assert told in pipeline.table([status])
    pipeline.run(steps, folder)
    assert f"04_tune_rerank: stale: {told}" in capsys.readouterr().out
    assert path.read_bytes() == whole
    assert path.with_name("chain.json.changed").read_bytes() == flip(whole)
    assert check.check_folder(work).problems == {}
    path.write_bytes(b"{}")
    pipeline.run(steps, folder, force=["04_tune_rerank"])
    assert path.read_bytes() == whole


def test_the_command_prints_one_line_or_what_is_bad(work, tmp_path):
    def run(folder):
        command = [sys.executable, "-m", "kit.check", str(folder)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = run(work)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert ": good, " in done.stdout
    path = work / "graph/toy/clean/index/rows.npy"
    path.write_bytes(flip(path.read_bytes()))
    done = run(work)
    assert done.returncode == 1
    assert done.stdout.startswith("graph/toy/clean/index/rows.npy: damaged")
    assert "--force 03_features_trained" in done.stdout and "1 bad of" in done.stderr
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        done = run(folder)
        assert done.returncode == 1 and str(folder) in done.stderr
