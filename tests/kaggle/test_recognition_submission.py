"""The submission notebook in recognition mode, from a work folder to a rehearsal."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kit.answers import submission
from kit.answers.recognition import Recognition
from kit.data import lists, sources, tables, toy
from kit.data.inputs import InputSpec
from kit.features import extract
from kit.kaggle import build, contents, mounts, rehearse
from kit.kaggle.runtime import Mode
from kit.models import net as nets
from kit.plan import Run
from kit.rerank import recogniser
from kit.rerank.recogniser import (
    Background,
    Frequent,
    Inliers,
    NonLandmark,
    Recogniser,
    Vote,
)

pytestmark = pytest.mark.slow

ROOT = Path(build.__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_submission.ipynb"
REFERENCE = "index_train_holdout"
MODELS = {"c2x": 1.0, "clean": 0.5}
# without steps of the batch: a rerun's answers are those of the same queries at home
PLAN = Recogniser(
    MODELS,
    (Vote(), NonLandmark(0.3, 0.3), Inliers(5.0, 20, side=64), Background(0.5, 20)),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A work folder of two small random networks on rendered photos."""
    folder = tmp_path_factory.mktemp("home")
    look = toy.ToyConfig(landmarks=12, images=160, side=64)
    run = Run("toy", toy.render(folder / "data", look), folder / "work")
    continents = tables.read_continents(ROOT / "datasets_meta" / "continents.csv")
    lists.build(sources.official(run.data), run.data, run.lists, continents)
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        spec = InputSpec(size=48)
        net = nets.build(nets.NetConfig("test_resnet", dim=16, input=spec))
        nets.save(net, run.runs / name, seen={})
    for images in ("query", "index", REFERENCE):
        places = run.runs, tuple(MODELS), run.lists, images, run.data, run.features
        extract.run(extract.Job(*places, workers=0))
    recogniser.save(PLAN, run.recogniser)
    return run


def expected(home, plan=PLAN):
    """The library's own predictions."""
    query, voters = (lists.load(home.lists, name) for name in ("query", REFERENCE))
    places = home.features, query, voters, home.data, home.lists
    return Recognition(*places).predict(plan)


def make(home, out, plan=PLAN):
    recogniser.save(plan, home.recogniser)
    count = len(lists.load(home.lists, "query"))
    order = build.Order(
        "alice", "toy", "landmark-recognition-2021", public_queries=count
    )
    found = contents.find(home, REFERENCE, task="recognition")
    return build.build(out / "build", found, order, ROOT, NOTEBOOK)


@pytest.fixture(scope="module")
def queries(home, tmp_path_factory):
    """The competition's photos: queries and nothing else."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copytree(home.data / mounts.QUERY, folder / mounts.QUERY)
    return folder


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A build with all steps."""
    return make(home, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def built(home, tmp_path_factory):
    """Without the step that needs the references' photos."""
    out = tmp_path_factory.mktemp("built")
    return make(home, out, recogniser.without(PLAN, "inliers"))


def printed(done, folder) -> str:
    place = folder / f"{done.layout}-{done.mode}" / rehearse.EXECUTED
    return place.read_text()


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Equal landmarks; other batches of the extraction round otherwise."""
    wanted = wanted.set_index("id").loc[found["id"]]
    assert np.mean(found["landmark"].to_numpy() == wanted["landmark"]) >= 0.97
    equal = found["landmark"].to_numpy() == wanted["landmark"].to_numpy()
    np.testing.assert_allclose(
        found["confidence"][equal], wanted["confidence"][equal], atol=0.02
    )


@pytest.mark.parametrize("mode", [Mode.COMMIT, Mode.RERUN])
@pytest.mark.parametrize("layout", mounts.LAYOUTS)
def test_a_run_finds_the_librarys_landmarks_without_an_index(
    built, home, queries, layout, mode, tmp_path
):
    done = rehearse.rehearse(built, queries, layout=layout, mode=mode, keep=tmp_path)
    assert done.ok, (done.problem, done.error)
    assert done.first_valid_s < 30
    found = submission.read_landmarks(done.submission)
    ids = {path.stem for path in mounts.images(queries, mounts.QUERY, mode)}
    assert set(found["id"]) == ids
    assert (found["landmark"] != "").mean() > 0.8
    same(found, expected(home, recogniser.without(PLAN, "inliers")))
    assert "recognise  done" in printed(done, tmp_path)
    known = set(lists.load(home.lists, "full").rows["landmark_id"])
    shown = submission.check_landmarks(done.submission, ids, known)
    assert shown == len(ids)


def test_references_whose_photos_are_shown_are_verified(whole, home, tmp_path):
    done = rehearse.rehearse(whole, home.data, mode=Mode.RERUN, keep=tmp_path)
    assert done.ok, (done.problem, done.error)
    found = submission.read_landmarks(done.submission)
    same(found, expected(home))
    bare = expected(home, recogniser.without(PLAN, "inliers")).set_index("id")
    apart = found["confidence"].to_numpy() - bare.loc[found["id"], "confidence"]
    assert apart.max() > 0.2


@pytest.mark.parametrize("mode", [Mode.COMMIT, Mode.RERUN])
def test_without_their_photos_the_answers_before_verification_stay(
    whole, home, queries, mode, tmp_path
):
    done = rehearse.rehearse(whole, queries, mode=mode, keep=tmp_path)
    assert done.valid and done.ok == (mode is Mode.RERUN)
    told = done.problem or printed(done, tmp_path)
    assert "verification needs their images" in told
    found = submission.read_landmarks(done.submission)
    same(found, expected(home, recogniser.without(PLAN, "inliers")))


def test_steps_of_the_batch_work_there_too(home, queries, tmp_path):
    plan = recogniser.with_step(recogniser.without(PLAN, "inliers"), Frequent(3, 0.5))
    out = make(home, tmp_path, plan)
    done = rehearse.rehearse(out, queries, keep=tmp_path / "kept")
    assert done.ok, (done.problem, done.error)
    found = submission.read_landmarks(done.submission)
    assert (found["confidence"] < -3).any()


@pytest.mark.parametrize("after", [0.5, 3.0])
def test_killed_after_the_first_file_there_is_a_valid_one(built, queries, after):
    done = rehearse.rehearse(built, queries, mode=Mode.RERUN, killed_after=after)
    assert done.valid, (done.problem, done.error)


@pytest.mark.parametrize("mode", [Mode.COMMIT, Mode.RERUN])
@pytest.mark.parametrize("what", ["reference", "recognition.json", "distractors"])
def test_what_did_not_travel_is_named_and_the_rerun_still_scores(
    built, queries, what, mode, tmp_path
):
    spoilt = Path(shutil.copytree(built, tmp_path / "spoilt"))
    name = {
        "reference": "reference-c2x/features__toy__c2x__index_train_holdout__ids.npy",
        "recognition.json": "models/answers__toy__recognition.json",
        "distractors": "lists/lists__index.csv",
    }[what]
    (spoilt / name).unlink()
    done = rehearse.rehearse(spoilt, queries, mode=mode, keep=tmp_path)
    assert done.valid
    assert done.ok == (mode is Mode.RERUN)
    assert "wrong manifest" in (done.problem or printed(done, tmp_path))
