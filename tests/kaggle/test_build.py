"""A work folder becomes a build that Kaggle takes, or one line says what is missing."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kit import checksums, files
from kit.answers.reranking import rank
from kit.data import lists, sources
from kit.data.inputs import InputSpec
from kit.features import store
from kit.features.views import Views
from kit.kaggle import build, check, contents, flat, manifest
from kit.models import net as nets
from kit.plan import Run
from kit.rerank import chain, recogniser
from kit.rerank.chain import Chain
from kit.rerank.steps import STEPS, AlphaQe, LandmarkCountry
from tests.answers.scenes import scene

ROOT = Path(__file__).resolve().parents[2]
SPECS = {"clean": InputSpec(size=48), "c2x": InputSpec(size=64)}
MODELS = {"clean": 0.5, "c2x": 1.0}
VIEWS = Views(scales=(0.707, 1.0), flip=True)
ORDER = build.Order("alice", "toy")
PARAMETERS = """\
recipe: str = "toy"  # schedule
work: str = "../toy"  # folder
data: str = "../data"  # images
query: str = "query"  # list
index: str = "index"  # list
reference: str = "index_train_holdout"  # list
competition: str = ""  # slug
datasets: list = []  # owner/slug
hours: float = 1.0  # of a session
public_queries: int = 5  # images
known: str = ""  # list
size: int = 5  # pixels
template: str = "L2"  # shape
scales: list = [1.0]  # of both sides
multiple: int = 1  # pixels
least: int = 1  # pixels
flip: bool = False  # mirrored too
normalise: bool = True  # each"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished work folder: lists, two models, features of four lists, a chain."""
    work, data = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("images")
    lines = ["path,label,group,split"]
    lines += [f"train/{n}.jpg,{'abc'[n % 3]},FR,train" for n in range(9)]
    lines += [f"index/{n}.jpg,{label},,index" for n, label in enumerate("abcx")]
    lines += [f"query/{n}.jpg,{label},,query" for n, label in enumerate("ab")]
    for line in lines[1:]:
        path = data / line.split(",")[0]
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (data / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(data / "table.csv", data)
    run = Run("toy", data, work)
    lists.build(facts, data, run.lists, sizes=False)
    torch.manual_seed(0)
    for model, spec in SPECS.items():
        weights = "/home/someone/weights/backbone.pth"
        net = nets.NetConfig("test_resnet", weights, dim=8, input=spec)
        nets.save(nets.EmbeddingNet(net), run.runs / model, {"f" * 64: "clean"})
        for name in ("query", "index", "index_train", "index_train_holdout"):
            features(run, model, name)
    chain.save(Chain(MODELS, (LandmarkCountry(),)), run.chain)
    return run


def features(run, model, name, views=VIEWS, /, **changes):
    """Random features as extraction writes them."""
    images = lists.load(run.lists, name)
    about = {
        "model": {"name": model, "hash": nets.describe(run.runs / model)["hash"]},
        "list": {"name": name, "hash": images.hash},
        "seen": {"f" * 64: "clean"},
    }
    about |= views.facts(SPECS[model]) | changes
    folder = run.features / model / name
    store.create(folder, images.ids, 8, 4, about)
    writer = store.Writer(folder)
    random = np.random.default_rng(len(model) + len(name))
    for block in range(len(writer.done)):
        rows = min(4, len(images) - 4 * block)
        writer.write(block, random.standard_normal((rows, 8)))
    store.finish(folder)
    (folder / "screen.npy").write_bytes(b"a copy that can be made again")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """The work folder, to be spoiled."""
    shutil.copytree(made.work, tmp_path / "work")
    return replace(made, work=tmp_path / "work")


def notebook(folder, parameters=PARAMETERS):
    """A notebook with these parameters that was run by papermill before."""
    code = {"cell_type": "code", "execution_count": 3}
    output = {"output_type": "stream", "name": "stdout", "text": ["/home/someone\n"]}
    code |= {"outputs": [output]}
    cells = [
        {"cell_type": "markdown", "id": "top", "metadata": {}, "source": ["# Rank"]},
        code
        | {
            "id": "parameters",
            "metadata": {"tags": ["parameters"], "papermill": {"status": "completed"}},
            "source": parameters.splitlines(keepends=True),
        },
        code
        | {
            "id": "earlier",
            "metadata": {"tags": ["injected-parameters"]},
            "source": ["hours = 77\n"],
        },
        code | {"id": "rank", "metadata": {}, "source": ["print(hours, recipe)"]},
    ]
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "x", "language": "python"},
        "papermill": {"input_path": "/home/someone/05_submission.ipynb"},
    }
    path = folder / "05_submission.ipynb"
    path.write_text(
        json.dumps(
            {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        )
    )
    return path


@pytest.fixture(scope="module")
def built(made, tmp_path_factory):
    """A build of everything that can travel, but for packages."""
    folder = tmp_path_factory.mktemp("built")
    found = contents.find(made, known="index")
    return build.build(folder / "build", found, ORDER, ROOT, notebook(folder))


def assigned(cell):
    """Values of a cell that only assigns literals."""
    lines = ast.parse("".join(cell["source"])).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


# --- what is built ------------------------------------------------------------------------------


def test_a_build_is_one_that_kaggle_takes(built):
    assert check.problems(built) == []
    (place,) = (path for path in built.parent.iterdir() if path.name[0] == ".")
    assert [path.name for path in place.iterdir()] == [".lock"]


def test_every_dataset_holds_what_it_is_named_for(built, made):
    held = {
        folder.name: sorted(path.name for path in folder.iterdir())
        for folder in manifest.datasets(built)
    }
    own = {manifest.DATASET, manifest.PARTS}
    stores = {
        f"{kind}-{model}": [
            f"features__toy__{model}__{images}__{name}" for name in STORE
        ]
        for kind, images in (("reference", "index_train"), ("known", "known"))
        for model in MODELS
    }
    weights = [
        f"runs__toy__{model}__model.{end}"
        for model in MODELS
        for end in ("safetensors", "json")
    ]
    expected = stores | {
        "kit": ["landmark_kit-0.1.0-py3-none-any.whl"],
        "models": [*weights, "answers__toy__chain.json"],
        "lists": ["lists__index_train.csv", "lists__index_train.json"],
    }
    assert held == {name: sorted(own.union(it)) for name, it in expected.items()}


STORE = ("ids.npy", "vectors.npy", "done.npy", "manifest.json")


def test_the_kernel_attaches_every_dataset_in_the_order_of_the_build(built):
    metadata = files.read_json(built / "submission" / manifest.KERNEL)
    folders = ["kit", "models", "lists", "reference-clean", "reference-c2x"]
    folders += ["known-clean", "known-c2x"]
    assert metadata["dataset_sources"] == [f"alice/toy-{it}" for it in folders]
    assert metadata["id"] == "alice/toy-submission"
    assert metadata["title"] == "toy submission"
    assert metadata["competition_sources"] == ["landmark-retrieval-2021"]
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["is_private"] is True and metadata["enable_gpu"] is True
    assert metadata["enable_internet"] is False
    about = files.read_json(built / "reference-c2x" / manifest.DATASET)
    assert about["id"] == "alice/toy-reference-c2x"
    assert about["title"] == "toy reference c2x"
    assert manifest.read(built).competition == "landmark-retrieval-2021"


def test_the_notebook_is_told_what_travels_and_how_it_was_looked_at(built):
    content = files.read_json(built / "submission" / "05_submission.ipynb")
    tags = [cell["metadata"].get("tags", [""])[0] for cell in content["cells"]]
    assert tags == ["", "parameters", "injected-parameters", ""]
    told = assigned(content["cells"][2])
    refs = files.read_json(built / "submission" / manifest.KERNEL)["dataset_sources"]
    assert told == {
        "recipe": "toy",
        "reference": "index_train",
        "competition": "landmark-retrieval-2021",
        "datasets": refs,
        "hours": 9.0,
        "public_queries": 1129,
        "known": "known",
        "size": 0,
        "template": "own",
        "scales": [0.707, 1.0],
        "multiple": 16,
        "least": 32,
        "flip": True,
        "normalise": False,
    }


def test_nothing_tells_of_the_machine_or_of_an_earlier_run(built, made):
    texts = [*built.rglob("*.json"), *built.rglob("*.ipynb")]
    assert len(texts) > 20
    for path in texts:
        text = path.read_text()
        for secret in ("/home", "/tmp", "/root", "/work", str(made.data), "papermill"):
            assert secret not in text, f"{path}: {secret}"
    content = files.read_json(built / "submission" / "05_submission.ipynb")
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    sent = check.sent_source(built / "submission" / "05_submission.ipynb")
    assert len(sent) < 300_000


def test_the_linked_mounts_are_a_work_folder_that_the_kit_reads(built, made, tmp_path):
    flat.link(manifest.datasets(built), tmp_path)
    there = replace(made, work=tmp_path)
    plan = chain.load(there.chain)
    assert plan == chain.load(made.chain)
    images = lists.load(there.lists, "index_train")
    assert images.hash == lists.load(made.lists, "index_train").hash
    for model in plan.models:
        about = nets.describe(there.runs / model)
        assert nets.load(there.runs / model).dim == 8
        for name, own in {"index_train": "index_train", "known": "index"}.items():
            found = store.load(there.features / model / name)
            store.expect(found, model_hash=about["hash"])
            ours = store.load(made.features / model / own)
            assert np.array_equal(found.vectors, ours.vectors)
            assert found.manifest == ours.manifest
    assert not list(tmp_path.rglob("screen.npy"))


def test_weights_and_features_take_no_second_space(built, made):
    ours = made.features / "c2x" / "index_train" / "vectors.npy"
    theirs = built / "reference-c2x" / "features__toy__c2x__index_train__vectors.npy"
    assert theirs.samefile(ours)


def test_papermill_injects_the_same(tmp_path):
    import papermill

    path = notebook(tmp_path)
    values = {
        "recipe": "glr2021/b6",
        "scales": [0.7, 1.0],
        "flip": True,
        "hours": 1e-5,
        "known": "a \"b\" \\ 'c' \n",
        "size": 3,
    }
    papermill.execute_notebook(
        str(path), str(tmp_path / "theirs.ipynb"), values, prepare_only=True
    )
    theirs = files.read_json(tmp_path / "theirs.ipynb")["cells"]
    ours = build.prepared(path, values)["cells"]
    assert [cell["cell_type"] for cell in ours] == [it["cell_type"] for it in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["metadata"].get("tags", []) == other["metadata"].get("tags", [])
    assert assigned(ours[2]) == assigned(theirs[2]) == values


def test_a_parameter_that_the_notebook_lacks_is_refused(made, tmp_path):
    path = notebook(tmp_path, PARAMETERS.replace("normalise: bool", "normalize: bool"))
    with pytest.raises(
        ValueError, match="parameter 'normalise', did you mean 'normali"
    ):
        build.build(tmp_path / "b", contents.find(made), ORDER, ROOT, path)
    assert not (tmp_path / "b").exists()


# --- what travels -------------------------------------------------------------------------------


def test_all_references_are_taken_before_those_of_the_holdout(run):
    assert contents.find(run).reference == "index_train"
    assert contents.find(run, "index_train_holdout").reference == "index_train_holdout"
    shutil.rmtree(run.features / "c2x" / "index_train")
    assert contents.find(run).reference == "index_train_holdout"


def test_a_chain_without_labels_needs_no_references(run):
    for images in ("index_train", "index_train_holdout"):
        for model in MODELS:
            shutil.rmtree(run.features / model / images)
        (run.lists / f"{images}.csv").unlink()
    chain.save(Chain(MODELS, (AlphaQe(),)), run.chain)
    found = contents.find(run)
    assert (found.reference, found.views) == ("", VIEWS)
    assert list(found.datasets()) == ["models"]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_asks_for_labels_exactly_if_it_fails_without_voters(name):
    plan = Chain({"m": 1.0}, (STEPS[name](),), k=5)
    small = replace(scene(), voters=None)
    said = ""
    try:
        rank(small, plan)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        said = str(error)
    assert contents.asks_labels(plan) == ("references that vote" in said), said


@pytest.fixture
def recognising(run):
    """The work folder without a chain, but with a recogniser that reads the index list."""
    run.chain.unlink()
    steps = (recogniser.Vote(), recogniser.NonLandmark(images="index"))
    plan = recogniser.Recogniser(MODELS, steps)
    recogniser.save(plan, run.recogniser)
    return run


def test_recognition_takes_references_and_images_without_a_landmark(
    recognising, tmp_path
):
    found = contents.find(recognising, task="recognition")
    shown = found.reference, found.known, found.distractors, found.views
    assert shown == ("index_train", "", "index", VIEWS)
    parameters = PARAMETERS + '\ntask: str = "retrieval"  # or recognition'
    note = notebook(tmp_path, parameters)
    order = replace(ORDER, competition="landmark-recognition-2021")
    out = build.build(tmp_path / "build", found, order, ROOT, note)
    assert check.problems(out) == []
    held = {folder.name: folder for folder in manifest.datasets(out)}
    kinds = [f"{kind}-{m}" for kind in ("distractors", "reference") for m in MODELS]
    assert sorted(held) == sorted(["kit", "lists", "models", *kinds])
    names = {path.name for path in held["models"].iterdir()}
    assert "answers__toy__recognition.json" in names
    assert "answers__toy__chain.json" not in names
    names = {path.name for path in held["distractors-c2x"].iterdir()}
    assert {f"features__toy__c2x__index__{name}" for name in STORE} <= names
    names = {path.name for path in held["lists"].iterdir()}
    assert {"lists__index.csv", "lists__index_train.json"} <= names
    told = build.told(out / "submission" / note.name)
    assert (told["task"], told["known"]) == ("recognition", "")
    assert told["competition"] == "landmark-recognition-2021"


def test_a_list_that_is_reference_and_distractor_travels_once(recognising):
    found = contents.find(recognising, reference="index_train", task="recognition")
    assert found.distractors == "index"
    steps = (recogniser.Vote(), recogniser.NonLandmark(images="index_train"))
    plan = recogniser.Recogniser(MODELS, steps)
    recogniser.save(plan, recognising.recogniser)
    found = contents.find(recognising, task="recognition")
    assert not any(name.startswith("distractors") for name in found.datasets())
    assert len(found.datasets()["lists"]) == 2


def test_without_that_step_no_list_but_the_references_travels(recognising):
    plan = recogniser.Recogniser(MODELS)
    recogniser.save(plan, recognising.recogniser)
    found = contents.find(recognising, task="recognition")
    assert (found.reference, found.distractors) == ("index_train", "")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda run: run.recogniser.unlink(),
            "no /.*/recognition.json; run 07_recognition first",
        ),
        (
            lambda run: [
                shutil.rmtree(run.features / "c2x" / name)
                for name in ("index_train", "index_train_holdout")
            ],
            "step 03_features_trained of scripts/run_pipeline.py makes it",
        ),
        (
            lambda run: shutil.rmtree(run.features / "clean" / "index"),
            "clean/index; step 03_features_trained",
        ),
        (
            lambda run: (run.lists / "index.csv").unlink(),
            "lists/index.csv; step 00_image_lists",
        ),
    ],
)
def test_what_recognition_lacks_is_told(recognising, spoil, words):
    spoil(recognising)
    with pytest.raises(FileNotFoundError, match=words):
        contents.find(recognising, task="recognition")


def test_recognition_is_refused_what_it_cannot_use(recognising):
    with pytest.raises(ValueError, match="searches no index: list index need not"):
        contents.find(recognising, known="index", task="recognition")
    with pytest.raises(ValueError, match="'tagging' is not one of retrieval, recog"):
        contents.find(recognising, task="tagging")
    plan = recogniser.Recogniser(
        MODELS, (recogniser.Vote(), recogniser.NonLandmark(images="query"))
    )
    recogniser.save(plan, recognising.recogniser)
    with pytest.raises(ValueError, match="reads list query, which is what the compet"):
        contents.find(recognising, task="recognition")


def test_a_notebook_without_injected_parameters_was_told_nothing(tmp_path):
    path = notebook(tmp_path)
    text = json.loads(path.read_text())
    text["cells"] = [c for c in text["cells"] if c.get("id") != "earlier"]
    path.write_text(json.dumps(text))
    assert build.told(path) == {}


def test_references_that_hold_the_known_images_travel_once(run):
    found = contents.find(run, "index_train", "index_train")
    assert found.known == "index_train"
    assert not any(name.startswith("known") for name in found.datasets())


@pytest.mark.parametrize(
    "views",
    [
        Views(),
        Views(size=96),
        Views(size=32, template="longest"),
        Views(template="L2", scales=(0.75, 1.0, 1.25), multiple=32, least=128),
        Views(template="square", normalise=True),
    ],
)
def test_what_is_extracted_on_kaggle_looks_as_the_references_do(run, views):
    for model in MODELS:
        features(run, model, "index_train", views)
    found = contents.find(run).views
    for spec in SPECS.values():
        assert found.facts(spec) == views.facts(spec)


def test_models_of_one_size_that_was_asked_for_are_told_from_their_own(run):
    for model in MODELS:
        features(run, model, "index_train", Views(size=48))
    assert contents.find(run).views.size == 48


@pytest.mark.parametrize(
    "other, words",
    [
        (replace(VIEWS, scales=(1.0,)), "scales than the rest"),
        (replace(VIEWS, flip=False, least=8), "least, flip than the rest"),
        (replace(VIEWS, size=50), "size than the rest"),
    ],
)
@pytest.mark.parametrize(
    "model, name",
    [("c2x", "index_train"), ("clean", "index"), ("clean", "index_train")],
)
def test_images_that_were_looked_at_in_other_ways_are_refused(
    run, model, name, other, words
):
    features(run, model, name, other)
    with pytest.raises(
        ValueError, match=f"^features of {model} {name} were made with other {words}"
    ):
        contents.find(run, known="index")


def test_features_that_do_not_say_how_they_were_made_are_refused(run):
    path = run.features / "c2x" / "index_train" / "manifest.json"
    about = files.read_json(path)
    del about["flip"]
    checksums.write_manifest(path, about)
    with pytest.raises(ValueError, match="c2x index_train do not say their flip"):
        contents.find(run)


def gone(*names):
    def spoil(run):
        for name in names:
            path = run.work / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


@pytest.mark.parametrize(
    "spoil, step",
    [
        (gone("answers/toy/chain.json"), "04_tune_rerank"),
        (gone("runs/toy/c2x/model.safetensors"), "02_train_c2x"),
        (gone("runs/toy/clean/model.json"), "02_train_clean"),
        (gone("lists/index_train.csv"), "00_image_lists"),
        (
            gone(
                "features/toy/clean/index_train",
                "features/toy/clean/index_train_holdout",
            ),
            "03_features_trained",
        ),
    ],
)
def test_what_is_missing_is_told_with_the_step_that_makes_it(run, spoil, step):
    spoil(run)
    words = f"^no /.*; step {step} of scripts/run_pipeline.py makes it$"
    with pytest.raises(FileNotFoundError, match=words):
        contents.find(run)


def test_missing_known_features_are_told_too(run):
    with pytest.raises(FileNotFoundError, match="clean/gone; step 03_features_trained"):
        contents.find(run, known="gone")


def test_a_model_that_is_no_stage_is_refused_with_the_stages(run):
    chain.save(Chain({"c3x": 1.0}), run.chain)
    with pytest.raises(FileNotFoundError, match="c3x .* no stage .* has clean, c2x$"):
        contents.find(run)


def test_an_unknown_recipe_is_refused(run):
    with pytest.raises(
        ValueError, match="recipe 'toys' is not one of toy, .*close: toy"
    ):
        contents.find(replace(run, recipe="toys"))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda r: (r.runs / "c2x" / "model.safetensors").write_bytes(b"x"),
            "is not the file that model.json describes; run step 02_train_c2x",
        ),
        (
            lambda r: features(
                r, "c2x", "index_train", model={"name": "", "hash": "x"}
            ),
            "features of model .* extract them again",
        ),
        (
            lambda r: features(r, "c2x", "index_train", list={"name": "", "hash": "x"}),
            "features of list .* extract them again",
        ),
        (
            lambda r: (r.lists / "index_train.csv").write_text("id\n"),
            "index_train.csv: damaged, .*00_image_lists",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(run, spoil, words):
    spoil(run)
    with pytest.raises(ValueError, match=words):
        contents.find(run)


def test_a_path_that_cannot_travel_is_refused(run, tmp_path):
    for folder in (run.runs, run.features):
        shutil.move(folder / "c2x", folder / "c__2x")
    chain.save(Chain({"c__2x": 1.0}), run.chain)
    with pytest.raises(ValueError, match="c__2x/model.safetensors cannot travel"):
        found = contents.find(run)
        build.build(tmp_path / "b", found, ORDER, ROOT, notebook(tmp_path))
    assert not (tmp_path / "b").exists()


def test_models_whose_datasets_would_be_one_are_refused(made):
    found = replace(contents.find(made), models=("b-6", "b_6"))
    with pytest.raises(ValueError, match="two models make the dataset reference-b-6"):
        found.datasets()


# --- what the user says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"user": "Alice"}, "user 'Alice' is not a name as in Kaggle's addresses"),
        ({"user": "alice/x"}, "user 'alice/x' is not"),
        ({"user": ""}, "user '' is not"),
        ({"name": "glr2021/b6"}, "'glr2021/b6' is not a slug"),
        ({"name": "-toy"}, "'-toy' is not a slug"),
        ({"competition": "Landmarks"}, "'Landmarks' is not a slug"),
        ({"machine_shape": "NvidiaTeslaP100"}, "not one of NvidiaTeslaT4, "),
        ({"machine_shape": "NvidiaTeslaT4Highmem"}, "not one of NvidiaTeslaT4, "),
        ({"hours": 0.0}, "0.0 hours are no time"),
        ({"hours": float("inf")}, "inf hours are no time"),
    ],
)
def test_an_order_is_refused_for(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(ORDER, **changes)


def test_a_title_that_is_too_long_is_refused_before_anything_is_copied(made, tmp_path):
    order = replace(ORDER, name="n" * 35)
    words = (
        "^reference-clean: title 'n.* is 51 letters long, .* 6 to 50; another --name"
    )
    with pytest.raises(ValueError, match=words):
        build.build(
            tmp_path / "b", contents.find(made), order, ROOT, notebook(tmp_path)
        )
    assert not (tmp_path / "b").exists()


def test_a_placeholder_that_nobody_knows_is_refused(made, tmp_path):
    templates = tmp_path / "datasets_meta" / "kaggle"
    shutil.copytree(ROOT / "datasets_meta" / "kaggle", templates)
    path = templates / "models" / manifest.DATASET
    path.write_text(path.read_text().replace("{user}", "{usr}"))
    with pytest.raises(ValueError, match="placeholder {usr}; known: user, name, model"):
        build.build(
            tmp_path / "b", contents.find(made), ORDER, tmp_path, notebook(tmp_path)
        )


@pytest.mark.parametrize(
    "slug", ["happy-whale-and-dolphin", "landmark-recognition-2021", "landmarks"]
)
def test_a_competition_of_other_folders_or_columns_is_refused(made, tmp_path, slug):
    order = replace(ORDER, competition=slug)
    with pytest.raises(ValueError) as told:
        build.build(
            tmp_path / "b", contents.find(made), order, ROOT, notebook(tmp_path)
        )
    for words in (
        repr(slug),
        "landmark-retrieval-2021 (retrieval)",
        "test/ and index/",
    ):
        assert words in str(told.value)
    assert not (tmp_path / "b").exists()


def test_two_builds_of_one_folder_follow_each_other(made, tmp_path, monkeypatch):
    out, found = tmp_path / "build", contents.find(made)
    inside, most, make = [], [], build.wheels.make

    def slow_make(*where):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.3)
        make(*where)
        inside.pop()

    monkeypatch.setattr(build.wheels, "make", slow_make)
    with ThreadPoolExecutor(2) as pool:
        told = [found, ORDER, ROOT, notebook(tmp_path)]
        for done in [pool.submit(build.build, out, *told) for _ in range(2)]:
            assert done.result() == out
    assert most == [1, 1] and check.problems(out) == []


def test_a_build_killed_between_two_renames_gives_the_earlier_one_back(
    built, made, tmp_path
):
    shutil.copytree(built, tmp_path / ".build.building" / "old")
    lacking = replace(contents.find(made), models=("clean", "gone"))
    with pytest.raises(OSError, match="gone"):
        build.build(tmp_path / "build", lacking, ORDER, ROOT, notebook(tmp_path))
    assert check.problems(tmp_path / "build") == []


def test_another_folder_is_never_replaced(made, tmp_path):
    out = tmp_path / "mine"
    found = contents.find(made)
    shutil.copytree(made.features / "c2x" / "index", out)  # has a manifest.json
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(FileExistsError, match="mine is there and is no build"):
        build.build(out, found, ORDER, ROOT, notebook(tmp_path))
    assert sorted(path.name for path in out.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is there and is no build"):
        build.build(tmp_path / "file", found, ORDER, ROOT, notebook(tmp_path))


def test_an_earlier_build_is_replaced_only_by_a_whole_one(built, made, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(built, out)
    (out / ".build.part").mkdir()
    found = contents.find(made)
    lacking = replace(found, models=("clean", "gone"))
    with pytest.raises(OSError, match="gone"):
        build.build(out, lacking, ORDER, ROOT, notebook(tmp_path))
    assert (out / "known-clean").is_dir()
    made_again = build.build(out, found, ORDER, ROOT, notebook(tmp_path))
    assert made_again == out and check.problems(out) == []
    assert not (out / "known-clean").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".build.building"]
    assert [path.name for path in (tmp_path / ".build.building").iterdir()] == [".lock"]


# --- the command --------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, str(ROOT / "scripts" / "build_kaggle.py"), *arguments]


def test_the_command_refuses_in_one_line(made, tmp_path):
    told = ("--user", "Alice", "--work", str(made.work), "--out", str(tmp_path / "b"))
    done = subprocess.run(command(*told), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("build_kaggle: user 'Alice' is not")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "b").exists()


def test_the_command_refuses_a_competition_before_it_looks_at_the_work(tmp_path):
    told = ("--user", "alice", "--work", str(tmp_path / "none"))
    slug = "happy-whale-and-dolphin"
    done = subprocess.run(
        command(*told, "--competition", slug),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert repr(slug) in done.stderr and "landmark-recognition-2021" in done.stderr


@pytest.mark.slow
def test_the_command_builds_with_the_repositorys_own_notebook(made, tmp_path):
    told = ("--user", "alice", "--work", str(made.work), "--out", str(tmp_path / "b"))
    done = subprocess.run(
        command(*told, "--name", "first-try", "--hours", "8.5"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["folder", "files", "MB"]
    assert check.problems(tmp_path / "b") == []
    about = files.read_json(tmp_path / "b" / "submission" / manifest.KERNEL)
    assert about["id"] == "alice/first-try-submission"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 2.0, 3.0])
def test_a_killed_build_leaves_no_half_one(made, tmp_path, after):
    out = tmp_path / "b"
    told = ("--user", "alice", "--work", str(made.work), "--out", str(out))
    process = subprocess.Popen(command(*told), start_new_session=True)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() or check.problems(out) == []
