import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kit.answers.retrieval import Scenes
from kit.data import lists, sources
from kit.features import graph, store
from kit.rerank.chain import Chain
from kit.rerank.steps import LandmarkCountry
from tests.answers.scenes import by_score, cosines, unit


@pytest.fixture
def made(tmp_path):
    """Nine train images of three landmarks in two countries, six of the index, three queries."""
    lines = ["path,label,group,split"]
    lines += [
        f"train/{n}.jpg,{'abc'[n % 3]},{['FR', 'FR', 'JP'][n % 3]},train"
        for n in range(9)
    ]
    lines += [f"index/{n}.jpg,{label},,index" for n, label in enumerate("abcxa")]
    lines += ["index/5.jpg,,,index"]
    lines += [f"query/{n}.jpg,{label},,query" for n, label in enumerate("abx")]
    for line in lines[1:]:
        path = tmp_path / "data" / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    facts = sources.from_csv(tmp_path / "table.csv", tmp_path / "data")
    lists.build(facts, tmp_path / "data", tmp_path / "lists", sizes=False)
    return {
        name: lists.load(tmp_path / "lists", name)
        for name in ("query", "index", "full")
    }


VECTORS = {"query": unit(3, 4, 1), "index": unit(6, 4, 2), "full": unit(9, 4, 3)}
CHAIN = Chain({"clean": 1.0})


def write(folder, images, model="m", vectors=None, **views):
    about = views | {
        "model": {"name": "clean", "hash": model * 64},
        "list": {"name": images.name, "hash": images.hash},
        "seen": {"c" * 64: "clean"},
    }
    values = VECTORS[images.name] if vectors is None else vectors
    store.create(folder / images.name, images.ids, 4, 4, about)
    writer = store.Writer(folder / images.name)
    for block in range(len(writer.done)):
        writer.write(block, values[block * 4 : block * 4 + 4])
    store.finish(folder / images.name)
    return folder / images.name


@pytest.fixture
def folder(tmp_path, made):
    for images in made.values():
        write(tmp_path / "features" / "clean", images)
    return tmp_path / "features"


@pytest.fixture
def scenes(folder, made):
    return Scenes(folder, made["query"], made["index"], made["full"])


def test_answers_are_the_ids_of_the_ranked_rows(scenes):
    names, ranked = scenes.answers(CHAIN)
    assert names.tolist() == scenes.query.ids.tolist()
    expected = by_score(cosines(VECTORS["query"], VECTORS["index"]), 6)
    assert ranked.tolist() == scenes.index.ids[expected].tolist()


def test_images_that_could_not_be_read_are_in_no_answer(folder, made):
    vectors = VECTORS["index"].copy()
    vectors[[1, 4]] = 0
    write(folder / "clean", made["index"], "m", vectors)
    scenes = Scenes(folder, made["query"], made["index"], made["full"])
    step = LandmarkCountry(50.0, 50.0)
    for chain in (CHAIN, Chain({"clean": 1.0}, (step,))):
        _, ranked = scenes.answers(chain)
        assert (ranked[:, 4:] == "").all() and (ranked[:, :4] != "").all()
        assert not np.isin(ranked, scenes.index.ids[[1, 4]]).any()


def test_only_readable_images_with_a_label_vote(folder, made):
    vectors = VECTORS["index"].copy()
    vectors[1] = 0
    write(folder / "other", made["index"], "n", vectors)
    write(folder / "other", made["query"], "n")
    assert made["index"].labels.tolist() == [0, 1, 2, -1, 0, -1]
    scenes = Scenes(folder, made["query"], made["index"], made["index"])
    voters = scenes.of({"other": 1.0}).labelled
    assert voters.rows.tolist() == [0, 2, 4]
    assert voters.landmarks.tolist() == [0, 2, 0]
    assert len(voters.countries) == 3


def test_voters_on_disk_are_those_of_the_loaded_list(
    folder, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(lists, "BLOCK", 2)
    country = made["full"].rows["country"].astype(str)
    country = country.mask(np.arange(9) == 4, "OTHER").mask(np.arange(9) == 7, "")
    images = replace(made["full"], rows=made["full"].rows.assign(country=country))
    stored = lists.find(tmp_path / "lists", "full")
    plain = Scenes(folder, made["query"], made["index"], stored).of({"clean": 1.0})
    changed = Scenes(folder, made["query"], made["index"], images).of({"clean": 1.0})
    assert plain.labelled.rows.tolist() == list(range(9))
    assert plain.labelled.landmarks.tolist() == made["full"].labels.tolist()
    for voters, names in ((plain, made["full"].rows["country"]), (changed, country)):
        codes = voters.labelled.countries.tolist()
        for code, name in zip(codes, names, strict=True):
            assert (code == -1) == (name in ("", "OTHER"))
        assert len(set(codes)) == len(set(names) - {"", "OTHER"}) + (-1 in codes)


def test_images_of_a_list_may_stand_there_twice_and_vote_twice(folder, made):
    rows = made["full"].rows
    twice = replace(made["full"], rows=pd.concat([rows, rows[::-1]]))
    voters = Scenes(folder, made["query"], made["index"], twice).of({"clean": 1.0})
    expected = [*range(9), *range(8, -1, -1)]
    assert voters.labelled.rows.tolist() == expected
    assert voters.labelled.landmarks.tolist() == [n % 3 for n in expected]


def test_references_may_have_been_seen_at_other_scales_where_that_is_said(folder, made):
    for name in ("query", "index"):
        shutil.rmtree(folder / "clean" / name)
        write(folder / "clean", made[name], scales=[1.0])
    asked = made["query"], made["index"], made["full"]
    with pytest.raises(ValueError, match="were made with different scales"):
        Scenes(folder, *asked).answers(CHAIN)
    assert Scenes(folder, *asked, other_scales=True).answers(CHAIN)[1].shape == (3, 6)
    shutil.rmtree(folder / "clean" / "index")
    write(folder / "clean", made["index"], scales=[0.5])
    with pytest.raises(ValueError, match="query and index were made with different"):
        Scenes(folder, *asked, other_scales=True).answers(CHAIN)


def test_of_several_models_only_images_that_all_could_read_vote(folder, made):
    vectors = VECTORS["full"].copy()
    vectors[[2, 5]] = 0
    write(folder / "other", made["full"], "n", vectors)
    for name in ("query", "index"):
        write(folder / "other", made[name], "n")
    scenes = Scenes(folder, made["query"], made["index"], made["full"])
    assert len(scenes.of({"clean": 1.0}).labelled.rows) == 9
    both = scenes.of({"clean": 1.0, "other": 0.5})
    assert both.labelled.rows.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert both.weights == (1.0, 0.5)


def test_a_scene_is_made_once_for_equal_models_and_weights(scenes):
    first = scenes.of({"clean": 1.0})
    assert scenes.of({"clean": 1}) is first
    assert scenes.of({"clean": 0.5}) is not first


def test_references_of_which_none_can_vote_must_be_told_and_change_nothing(
    folder, made, caplog
):
    write(folder / "clean", made["full"], "m", np.zeros((9, 4)))
    scenes = Scenes(folder, made["query"], made["index"], made["full"])
    voting = scenes.answers(replace(CHAIN, steps=(LandmarkCountry(),)))
    assert "list full has no labelled image" in caplog.text
    plain = Scenes(folder, made["query"], made["index"]).answers(CHAIN)
    assert voting[1].tolist() == plain[1].tolist()


def test_a_model_without_references_can_search_and_not_vote(folder, made):
    for name in ("query", "index"):
        write(folder / "bare", made[name])
    scenes = Scenes(folder, made["query"], made["index"], made["full"])
    assert scenes.answers(Chain({"bare": 1.0}))[1].shape == (3, 6)
    with pytest.raises(ValueError, match="references that vote; name their list"):
        scenes.answers(Chain({"bare": 1.0}, (LandmarkCountry(),)))


def test_missing_features_are_refused(made, tmp_path):
    scenes = Scenes(tmp_path / "nowhere", made["query"], made["index"])
    with pytest.raises(FileNotFoundError, match="no features in .*03_extract_features"):
        scenes.answers(CHAIN)


@pytest.mark.parametrize("name", ["query", "index", "full"])
def test_features_of_another_version_of_a_list_are_refused(folder, made, name):
    newer = made | {name: replace(made[name], hash="0" * 64)}
    scenes = Scenes(folder, newer["query"], newer["index"], newer["full"])
    message = f"^features of list {name}: hash .* is not the expected 000000000000"
    with pytest.raises(ValueError, match=message):
        scenes.answers(CHAIN)


@pytest.mark.parametrize("name", ["index", "full"])
def test_features_of_another_model_are_refused(scenes, name):
    write(
        scenes.folder / "clean",
        getattr(scenes, "reference" if name == "full" else name),
        "n",
    )
    message = "^features of model clean: hash nnnnnnnnnnnn is not the expected mmmmmmmm"
    with pytest.raises(ValueError, match=message):
        scenes.answers(CHAIN)


@pytest.mark.parametrize(
    "views", [{"scales": [0.7, 1.0]}, {"flip": True}, {"size": 512}, {"template": "L2"}]
)
def test_features_that_were_made_in_another_way_are_refused(scenes, views):
    write(scenes.folder / "clean", scenes.index, **views)
    message = (
        f"^features of query and index were made with different {next(iter(views))}$"
    )
    with pytest.raises(ValueError, match=message):
        scenes.answers(CHAIN)


def test_models_with_features_of_different_images_are_refused(scenes, made):
    fewer = replace(made["index"], rows=made["index"].rows.iloc[1:])
    for name in ("query", "full"):
        write(scenes.folder / "other", made[name], "n")
    write(scenes.folder / "other", fewer, "n", VECTORS["index"][1:])
    with pytest.raises(
        ValueError, match="models clean and clean have features of diff"
    ):
        scenes.answers(Chain({"clean": 1.0, "other": 1.0}))


def test_what_was_seen_are_the_lists_of_the_models_and_the_references(scenes):
    met = {"c" * 64: "clean", scenes.reference.hash: "full"}
    assert scenes.seen(["clean"]) == met


def test_stored_graphs_are_found_and_those_of_other_features_refused(
    folder, made, tmp_path, monkeypatch
):
    asked = made["query"], made["index"], made["full"], None, tmp_path / "graph"
    plain = Scenes(folder, *asked).of({"clean": 1.0})
    assert plain.models[0].graphs == {}
    for name in ("index", "full"):
        out = tmp_path / "graph" / "clean" / name
        graph.build(graph.Job(folder / "clean" / name, out, k=4))
    found = Scenes(folder, *asked).of({"clean": 1.0})
    assert set(found.models[0].graphs) == {"index", "reference"}
    assert torch.equal(
        found.near("index", "index", 5).rows, plain.near("index", "index", 5).rows
    )
    shutil.rmtree(folder / "clean" / "index")
    write(folder / "clean", made["index"], vectors=unit(6, 4, 9), size=96)
    for name in ("query", "full"):
        shutil.rmtree(folder / "clean" / name)
        write(folder / "clean", made[name], size=96)
    with pytest.raises(ValueError, match="not the graph of these features of index"):
        Scenes(folder, *asked).of({"clean": 1.0})
