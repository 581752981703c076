"""07_recognition on a toy set whose features are those of a small random network."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from kit import checksums, pipeline
from kit.answers import gain_table, submission
from kit.answers.metrics import gap
from kit.data import lists, sources, tables, toy
from kit.data.inputs import InputSpec
from kit.features import extract
from kit.kaggle import answering, entry
from kit.models import net as nets
from kit.plan import Run
from kit.rerank import recogniser

ROOT = Path(__file__).resolve().parents[2]
MODELS, REFERENCE = ("c2x", "clean"), "index_train_holdout"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Run:
    """Lists, and features of two random networks."""
    folder = tmp_path_factory.mktemp("recognition")
    look = toy.ToyConfig(landmarks=8, images=90, side=48)
    run = Run("toy", toy.render(folder / "data", look), folder / "work")
    continents = tables.read_continents(ROOT / "datasets_meta" / "continents.csv")
    lists.build(sources.official(run.data), run.data, run.lists, continents)
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        spec = InputSpec(size=32)
        net = nets.build(nets.NetConfig("test_resnet", dim=16, input=spec))
        nets.save(net, run.runs / name, seen={})
    for images in ("query", "index", REFERENCE, "index_train"):
        places = run.runs, MODELS, run.lists, images, run.data, run.features
        extract.run(extract.Job(*places, workers=0))
    return run


def step(name: str, notebook: str, /, **parameters) -> pipeline.Step:
    return pipeline.Step(name, ROOT / "notebooks" / f"{notebook}.ipynb", parameters)


def places(run: Run, out: Path) -> dict[str, object]:
    return {
        "lists_folder": str(run.lists),
        "features": str(run.features),
        "data": str(run.data),
        "trials": 3,
        "recogniser_path": str(out / "recognition.json"),
        "submission_path": str(out / "landmarks.csv"),
        "gains_path": str(out / "recognition_gains.csv"),
    }


@pytest.fixture(scope="module")
def done(work):
    """The notebook's run, with all steps."""
    recognise = step("07", "07_recognition", **places(work, work.answers))
    pipeline.run([recognise], work.work / "steps")
    return work


def printed(run: Run) -> str:
    text = (run.work / "steps" / "07.ipynb").read_text()
    outputs = [o for c in json.loads(text)["cells"] for o in c.get("outputs", [])]
    return "".join("".join(o.get("text", "")) for o in outputs)


def test_gap_stands_there_with_and_without_each_step(done):
    names = [name for name, *_ in gain_table.read(done.recognition_gains)]
    for name in ("nearest", "vote", "all steps", "all steps + fusion"):
        assert name in names
    for name in ("vote", "non_landmark", "inliers", "background", "frequent"):
        assert {f"({name}, published)", f"({name})"} <= set(names)
    plan = recogniser.load(done.recogniser)
    for taken in plan.steps[1:]:
        assert f"(without {taken.name})" in names
    assert all(name in printed(done) for name in names)
    assert "private GAP" in printed(done) and "accuracy" in printed(done)


def test_the_submission_has_the_gap_that_is_printed(done):
    query = lists.load(done.lists, "query")
    path = done.landmarks
    train = set(lists.load(done.lists, "full").rows["landmark_id"])
    assert submission.check_landmarks(path, query.ids, train) == len(query)
    solution = tables.read_recognition(done.lists / "recognition.csv")
    score = gap.evaluate(submission.read_landmarks(path), solution)
    rows = {name: row for name, *row in gain_table.read(done.recognition_gains)}
    public, private, note = rows["all steps + fusion"]
    assert score.public == pytest.approx(public, abs=1e-6)
    assert score.private == pytest.approx(private, abs=1e-6)
    assert f"{score.private:.4f}" in printed(done)
    assert "{Public:.4f}".format(**score.accuracy) in note


def test_what_is_kept_gains_on_the_public_half(done):
    rows = {name: row for name, *row in gain_table.read(done.recognition_gains)}
    assert rows["vote"][0] <= rows["all steps"][0] <= rows["all steps + fusion"][0]


def test_the_submission_notebook_gives_the_same_landmarks(done, tmp_path):
    given = {"recipe": "toy", "work": str(done.work), "data": str(done.data)}
    at_home = step("05", "05_submission", task="recognition", **given)
    before = done.landmarks.read_text()
    done.landmarks.unlink()
    pipeline.run([at_home], tmp_path / "steps")
    assert done.landmarks.read_text() == before
    assert not done.submission.exists()
    assert "private GAP" in (tmp_path / "steps" / "05.ipynb").read_text()


def test_references_that_hold_the_searched_images_are_refused_or_called_leaky(
    done, tmp_path
):
    given = places(done, tmp_path) | {"reference": "index_train", "steps": []}
    honest = step("honest", "07_recognition", **given)
    with pytest.raises(pipeline.StepError, match="LeakError: list index_train holds"):
        pipeline.run([honest], tmp_path / "steps")
    assert not (tmp_path / "recognition.json").exists()
    told = step("told", "07_recognition", **given, optimistic=True)
    pipeline.run([told], tmp_path / "steps")
    rows = gain_table.read(tmp_path / "recognition_gains.csv")
    assert all("LEAKY" in note for *_, note in rows)


def test_queries_of_unknown_landmarks_must_be_named_without_a_gap(done, tmp_path):
    folder = tmp_path / "lists"
    shutil.copytree(done.lists, folder)
    truth = tables.read_recognition(folder / "recognition.csv")
    unknown = truth.assign(landmarks="").rename(columns={"usage": "Usage"})
    unknown.to_csv(folder / "recognition.csv", index=False)
    about = {"checksums": checksums.compute_checksums(folder, ["recognition.csv"])}
    checksums.write_manifest(folder / "recognition.json", about)
    for name in ("index", "query"):  # features of the copied lists are the same
        assert lists.load(folder, name).hash == lists.load(done.lists, name).hash
    given = places(done, tmp_path) | {"lists_folder": str(folder)}
    pipeline.run([step("open", "07_recognition", **given)], tmp_path / "steps")
    rows = gain_table.read(tmp_path / "recognition_gains.csv")
    assert all(math.isnan(half) for _, *halves, _ in rows for half in halves)
    assert recogniser.load(tmp_path / "recognition.json").steps == (recogniser.Vote(),)
    assert len(submission.read_landmarks(tmp_path / "landmarks.csv")) == len(truth)


def test_what_recognition_needs_is_refused_by_name(done):
    given = answering.Given(done)
    kind = answering.task("recognition")
    plan = kind.load(done)
    with pytest.raises(ValueError, match="recognition needs references"):
        kind(given, plan)
    with pytest.raises(ValueError, match="'ranking' is not one of retrieval, recog"):
        answering.task("ranking")
    with pytest.raises(FileNotFoundError, match="run 07_recognition first"):
        kind.load(Run("toy", done.data, done.work / "none"))


def test_the_vote_comes_first_and_verification_last(done, tmp_path):
    kind = answering.task("recognition")
    out = tmp_path / "submission.csv"
    run = entry.at_home(done, out, kind.form)
    steps = (recogniser.Vote(), recogniser.Background(), recogniser.Inliers(side=48))
    plan = recogniser.Recogniser({"c2x": 1.0}, (steps[0], steps[2], steps[1]))
    answers = kind(answering.Given(done, reference=REFERENCE), plan)
    files = []
    for name in kind.steps:
        answers.write(run, name)
        files.append(out.read_text())
        assert answers.score()[0].queries["confidence"].notna().any()
    assert kind.steps == ("vote", "recognise", "verify")
    assert len(set(files)) == 3
    before = out.stat().st_ino
    answers.write(run, "verify")
    assert out.stat().st_ino == before  # nothing changed, nothing is done
