"""The submission of a finished demo, rehearsed: KIT_DEMO names its work folder, as in test_demo."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kit import files
from kit.answers import submission
from kit.answers.reranking import rank
from kit.answers.retrieval import Scenes
from kit.answers.scene import Scene
from kit.data import lists
from kit.kaggle import build, contents, mounts, rehearse
from kit.kaggle.runtime import Mode
from kit.plan import INDEX, QUERY, Run
from kit.rerank import chain

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = {"test": 20, "index": 60}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Run:
    if not os.environ.get("KIT_DEMO"):
        pytest.skip("no finished demo: KIT_DEMO names its work folder")
    folder = Path(os.environ["KIT_DEMO"]).resolve()
    about = files.read_json(folder / "lists" / "query.json")
    return Run(os.environ.get("KIT_RECIPE", "toy"), Path(about["root"]), folder)


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """Some of the demo's photos."""
    folder = tmp_path_factory.mktemp("photos")
    for name, count in PHOTOS.items():
        for path in mounts.images(demo.data, name, Mode.COMMIT)[::3][:count]:
            link = folder / path.relative_to(demo.data)
            link.parent.mkdir(parents=True)
            link.symlink_to(path.resolve())
    return folder


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    name, count = contents.slug(demo.recipe), PHOTOS["test"]
    order = build.Order("alice", name, public_queries=count)
    notebook = ROOT / "notebooks" / "05_submission.ipynb"
    out = tmp_path_factory.mktemp("made") / "build"
    return build.build(out, contents.find(demo), order, ROOT, notebook)


@pytest.fixture(scope="module")
def own(demo, data):
    """The library's ranking of a run's queries, from the demo's features."""
    plan = chain.load(demo.chain)
    query, index = (lists.load(demo.lists, name) for name in (QUERY, INDEX))
    voters = lists.load(demo.lists, contents.find(demo).reference)
    whole = Scenes(demo.features, query, index, voters).of(plan.models)

    def some(features, folder, mode):
        ids = np.array([path.stem for path in mounts.images(data, folder, mode)], "U16")
        rows = features.find(ids)
        return replace(features, ids=ids, vectors=features.vectors[rows])

    def own(mode):
        models = [
            replace(
                model,
                query=some(model.query, "test", mode),
                index=some(model.index, "index", mode),
                graphs={},
            )
            for model in whole.models
        ]
        scene = Scene(models, whole.weights, whole.voters)
        scores, rows = rank(scene, plan)
        ids = models[0].index.ids
        return {
            query: [ids[row] for row, score in zip(*both, strict=True) if score > -1e30]
            for query, *both in zip(
                models[0].query.ids, rows.tolist(), scores.tolist(), strict=True
            )
        }

    return own


@pytest.mark.parametrize("mode", [Mode.COMMIT, Mode.RERUN])
def test_each_layout_gives_the_librarys_own_ranking(made, data, own, tmp_path, mode):
    wanted = own(mode)
    for layout in mounts.LAYOUTS:
        run = rehearse.rehearse(made, data, layout=layout, mode=mode, keep=tmp_path)
        assert run.ok, f"{run.problem}\n{run.error}"
        assert run.first_valid_s < 30
        found = submission.read(run.submission)
        assert found.keys() == wanted.keys()
        assert found == wanted
