"""01_clean_labels on a toy set whose features are those of a small random network, in both modes."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from kit import files, pipeline
from kit.answers.cleaning import rule, table
from kit.answers.cleaning.candidates import Labelled, labelled
from kit.answers.cleaning.verified import Verified
from kit.data import lists, sources, toy
from kit.data.inputs import InputSpec
from kit.features import extract, graph, store
from kit.models import net as nets
from kit.plan import Run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Run:
    """Lists, features of `full`, and their graph."""
    folder = tmp_path_factory.mktemp("cleaning")
    look = toy.ToyConfig(landmarks=6, images=90, side=96)
    run = Run("toy", toy.render(folder / "data", look), folder / "work")
    lists.build(sources.official(run.data), run.data, run.lists, wanted=["full"])
    torch.manual_seed(0)
    spec = InputSpec(size=32)
    net = nets.build(nets.NetConfig("test_resnet", dim=16, input=spec))
    nets.save(net, run.runs / "clean", seen={})
    places = run.runs, ("clean",), run.lists, "full", run.data, run.features
    extract.run(extract.Job(*places, workers=0))
    stored, near = (folder / "work" / kind for kind in ("stored", "graph"))
    (run.features / "clean").rename(stored)
    graph.build(graph.Job(stored / "full", near / "full", k=40))
    return run


def cleaned(run: Run, mode: str, **parameters) -> Path:
    out = run.work / "cleaning" / mode
    places = {
        "lists_folder": str(run.lists),
        "features": str(run.work / "stored"),
        "graphs": str(run.work / "graph"),
        "data": str(run.data),
        "out": str(out),
    }
    notebook = ROOT / "notebooks" / "01_clean_labels.ipynb"
    step = pipeline.Step(mode, notebook, places | {"mode": mode} | parameters)
    pipeline.run([step], run.work / "steps")
    return out


def listed(run: Run) -> Labelled:
    stored = store.load(run.work / "stored" / "full")
    near = graph.load(run.work / "graph" / "full", stored)
    return labelled(lists.load(run.lists, "full"), stored, near)


@pytest.fixture(scope="module")
def voted(work) -> Path:
    return cleaned(work, "votes")


@pytest.fixture(scope="module")
def verified(work) -> Path:
    given = {"trusted": str(work.data / "train" / "train_clean.csv"), "sampled": 8}
    eased = {"min_neighbours": 1, "backend": "sift", "false_share": 0.3}
    return cleaned(work, "inliers", **given, **eased)


def printed(run: Run, mode: str) -> str:
    text = (run.work / "steps" / f"{mode}.ipynb").read_text()
    outputs = [o for c in json.loads(text)["cells"] for o in c.get("outputs", [])]
    return "".join("".join(o.get("text", "")) for o in outputs)


@pytest.mark.parametrize("mode", ["votes", "inliers"])
def test_the_clean_list_is_one_that_lists_are_built_of(work, request, mode):
    out = request.getfixturevalue({"votes": "voted", "inliers": "verified"}[mode])
    path = out / "train_clean.csv"
    full = lists.load(work.lists, "full")
    stays = table.trusted(path, listed(work))
    assert 0 < stays.sum() < len(full)
    facts = sources.read(work.data, clean=path)
    lists.build(facts, work.data, out / "lists", wanted=["clean"])
    assert set(lists.load(out / "lists", "clean").ids) == set(full.ids[stays])
    about = files.read_json(path.with_suffix(".json"))
    assert about["images"] == stays.sum() and about["how"]["rule"]["mode"] == mode
    assert about["how"]["features"]["list"]["hash"] == full.hash
    assert f"{stays.sum()} of {len(full)} images stay" in printed(work, mode)
    assert (out / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_the_threshold_is_the_one_on_the_curve(verified):
    curve = pd.read_csv(verified / "curve.csv")
    asked = files.read_json(verified / "train_clean.json")["how"]["rule"]
    enough = curve[curve["false"] <= 0.3]
    assert asked["min_inliers"] == enough["min_inliers"].iloc[0]
    how = files.read_json(verified / "train_clean.json")["how"]
    assert how["backend"]["name"] == "sift" and how["most"] == 99
    assert how["calibrated"]["false_share"] == 0.3
    assert "Inliers" in (verified / "page.html").read_text()


def test_the_grid_is_written_and_local_features_are_gone(verified):
    grid = pd.read_csv(verified / "grid.csv")
    assert list(grid) == ["min_inliers", "min_neighbours", "landmarks", "images"]
    assert len(grid) == 40
    found = Verified(verified / "sift")
    assert found.manifest["pairs"] > 0 and found.manifest["most"] == 99
    names = {path.name for path in verified.iterdir()} - {"lists"}
    assert names == {
        *("train_clean.csv", "train_clean.json", "page.html"),
        *("curve.csv", "grid.csv", "sift"),
    }


def test_another_threshold_verifies_nothing_again(work, verified):
    before = {path: path.stat().st_mtime_ns for path in (verified / "sift").iterdir()}
    needs = rule.Rule("inliers", min_inliers=12, min_neighbours=2)
    eased = {"min_inliers": 12, "min_neighbours": 2, "backend": "sift"}
    cleaned(work, "inliers", **eased)
    after = {path: path.stat().st_mtime_ns for path in (verified / "sift").iterdir()}
    lock = verified / "sift" / ".lock"
    assert after | {lock: 0} == before | {lock: 0}
    given, found = listed(work), Verified(verified / "sift")
    stays = rule.by_inliers(found, given.labels, needs).images
    trusted = table.trusted(verified / "train_clean.csv", given)
    assert 0 < trusted.sum() < len(given)
    assert (trusted == stays).all()
