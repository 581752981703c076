"""Every notebook is clean in the repository and runs through the pipeline on a tiny toy set."""

import ast
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from kit import pipeline, plan
from kit.answers import gain_table, retrieval, submission
from kit.answers.metrics import mean_ap
from kit.data import lists, sources, tables, toy
from kit.features import store

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {
    "clean": {"size": 48, "epochs": 1, "batch": 8},
    "c2x": {"size": 64, "epochs": 1, "batch": 8},
}


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [
        cell
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


def tagged(path: Path) -> list[dict]:
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_results_and_with_stable_ids(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "papermill" not in notebook["metadata"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_defines_nothing_but_a_helper(path):
    code = ["".join(cell["source"]) for cell in cells(path) if cell not in tagged(path)]
    assert sum(len(text.splitlines()) for text in code) < 60
    assert cells(path, "markdown")[0]["source"][0].startswith("# ")
    defined = [
        node
        for text in code
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert all(len(node.body) == 1 for node in defined)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_reads_every_parameter_with_its_type_and_help(path, caplog):
    import papermill

    (cell,) = tagged(path)
    with caplog.at_level(logging.WARNING):
        known = papermill.inspect_notebook(str(path))
    assert not caplog.records
    tree = ast.parse("".join(cell["source"]))
    assert [node.target.id for node in tree.body] == list(known)
    for name, about in known.items():
        assert about["inferred_type_name"] != "None", name
        assert about["help"], name
        ast.literal_eval(about["default"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> plan.Run:
    """The pipeline's whole run on a tiny toy set."""
    folder = tmp_path_factory.mktemp("tiny")
    data = toy.render(folder / "data", toy.ToyConfig(landmarks=8, images=80, side=64))
    asked = {"recognise": True, "cleaning": "votes"}
    about = {"workers": 1, "overrides": TINY} | asked
    run = plan.Run("toy", data, folder / "work", **about)
    pipeline.run(steps(run), run.folder)
    return run


def steps(run: plan.Run) -> list[pipeline.Step]:
    continents = ROOT / "datasets_meta" / "continents.csv"
    return plan.steps(run, ROOT / "notebooks", continents)


def test_the_pipeline_runs_every_notebook(tiny):
    ran = {step.notebook.name for step in steps(tiny)}
    # tests/kaggle/test_publish.py and tests/test_tune.py run these
    by_hand = {"06_publish.ipynb", "08_tune_training.ipynb"}
    assert ran == {path.name for path in NOTEBOOKS} - by_hand
    states = pipeline.status(steps(tiny), tiny.folder)
    assert {each.state for each in states} == {"done"}


def test_the_submission_answers_every_query_with_index_images(tiny):
    query, index = (lists.load(tiny.lists, name) for name in ("query", "index"))
    assert submission.check(tiny.submission, query.ids, index.ids) == len(query)
    assert max(map(len, submission.read(tiny.submission).values())) <= 100


def test_the_printed_score_is_the_submission_s_own(tiny):
    score = mean_ap.evaluate_file(tiny.submission, tiny.lists / "solution.csv")
    taken = [row for row in gain_table.read(tiny.gains) if row[0][0] != "("]
    _, public, private, _ = taken[-1]
    assert score.public == pytest.approx(public, abs=1e-6)
    assert score.private == pytest.approx(private, abs=1e-6)
    assert f"{score.private:.4f}" in tiny.report.read_text()


def test_a_number_stands_beside_what_it_was_measured_with(tiny):
    searched = lists.load(tiny.lists, "index")
    told = f"index index {searched.hash[:8]}, {len(searched)} images"
    assert told in tiny.report.read_text()
    for step in ("04_tune_rerank", "05_submission"):
        assert told in (tiny.folder / f"{step}.ipynb").read_text()
    voters = lists.load(tiny.lists, "index_train_holdout")
    told = f"index {voters.name} {voters.hash[:8]}, {len(voters)} images"
    assert told in (tiny.folder / "07_recognition.ipynb").read_text()


def test_a_cleaned_list_is_one_that_lists_take(tiny, tmp_path):
    cleaned = tiny.cleaned / "train_clean.csv"
    facts = sources.read(tiny.data, "gldv2", clean=cleaned)
    lists.build(facts, tiny.data, tmp_path, sizes=False, wanted=("clean", "c2x"))
    kept = set(lists.load(tmp_path, "clean").ids)
    written = tables.read_csv(cleaned, ("landmark_id", "images"))
    assert kept == set(" ".join(written["images"]).split())
    assert 0 < len(kept) < len(lists.load(tiny.lists, "full"))


def test_no_step_learned_from_what_it_is_measured_on(tiny):
    searched = lists.load(tiny.lists, "index")
    for model in ("clean", "c2x"):
        seen = store.load(tiny.features / model / "query").manifest["seen"]
        assert seen and lists.leaks(seen, tiny.lists, searched) == {}


def test_a_second_run_does_nothing_and_changes_nothing(tiny):
    before = tiny.submission.stat().st_mtime_ns
    pipeline.run(steps(tiny), tiny.folder)
    assert tiny.submission.stat().st_mtime_ns == before


def test_a_leaky_reference_is_refused_unless_it_is_called_optimistic(tiny, tmp_path):
    places = {
        "lists_folder": str(tiny.lists),
        "features": str(tiny.features),
        "models": ["c2x"],
        "reference": "index_train",
        "chain_path": str(tmp_path / "chain.json"),
        "gains_path": str(tmp_path / "gains.csv"),
    }
    extract = pipeline.Step(
        "extract",
        ROOT / "notebooks" / "03_extract_features.ipynb",
        {
            "models": ["c2x"],
            "images": ["index_train"],
            "lists_folder": str(tiny.lists),
            "data": str(tiny.data),
            "runs": str(tiny.runs),
            "features": str(tiny.features),
        },
    )
    tune = ROOT / "notebooks" / "04_tune_rerank.ipynb"
    honest = pipeline.Step("honest", tune, places)
    with pytest.raises(pipeline.StepError, match="LeakError: list index_train holds"):
        pipeline.run([extract, honest], tmp_path / "steps")
    assert not (tmp_path / "chain.json").exists()
    told = pipeline.Step("told", tune, places | {"optimistic": True})
    pipeline.run([told], tmp_path / "steps")
    assert all("LEAKY" in note for *_, note in gain_table.read(tmp_path / "gains.csv"))


def test_two_processes_extract_the_same_features_and_find_the_same_images(
    tiny, tmp_path
):
    twice = pipeline.Step(
        "twice",
        ROOT / "notebooks" / "03_extract_features.ipynb",
        {
            "models": ["c2x"],
            "images": ["query", "index"],
            "lists_folder": str(tiny.lists),
            "data": str(tiny.data),
            "runs": str(tiny.runs),
            "features": str(tmp_path / "features"),
            "num_gpus": 2,
            "workers": 1,
        },
    )
    pipeline.run([twice], tmp_path / "steps")
    query, index = (lists.load(tiny.lists, name) for name in ("query", "index"))
    one, two = (
        retrieval.Scenes(folder, query, index).of({"c2x": 1.0})
        for folder in (tiny.features, tmp_path / "features")
    )
    for which in ("query", "index"):
        ours, theirs = (each.models[0].of(which) for each in (one, two))
        assert np.array_equal(ours.ids, theirs.ids)
        gap = np.abs(ours.vectors.astype(float) - theirs.vectors)
        assert gap.max() < 1e-3
    (scores, rows), (again, others) = (
        each.near("query", "index", 100) for each in (one, two)
    )
    differ = rows != others
    assert not differ.any() or (scores - again)[differ].abs().max() < 2e-3
