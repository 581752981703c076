import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kit import checksums
from kit.answers.metrics import definitions, extraction, gap, gldv2, mean_ap
from kit.answers.metrics.extraction import Networks
from kit.answers.metrics.gldv2 import Options, evaluate
from kit.answers.retrieval import Scenes
from kit.data import lists, sources, tables, toy
from kit.features import store
from kit.features.views import Views
from kit.rerank.chain import Chain
from kit.rerank.steps import build
from tests.answers.metrics import networks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = toy.ToyConfig(landmarks=8, images=120, side=48)
    return toy.render(tmp_path_factory.mktemp("toy") / "data", config)


def met(path, seen):
    """Lets a stored network have met other lists."""
    about = json.loads((path / "model.json").read_text())
    checksums.write_manifest(path / "model.json", about | {"seen": seen})


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """An untrained network that has met no list."""
    (path,) = networks.saved(tmp_path_factory.mktemp("runs"), "bare")
    met(path, {})
    return Networks(*extraction.networks([path]), Views(), workers=0, batch=16)


@pytest.fixture(scope="module")
def options(data, looks, tmp_path_factory, continents):
    return Options(data, tmp_path_factory.mktemp("work"), looks, continents=continents)


@pytest.fixture(scope="module")
def lines(options):
    return list(evaluate(options))


def answers(options, chain):
    query, index = (lists.load(options.lists, name) for name in ("query", "index"))
    return Scenes(options.work / "features", query, index).answers(chain)


def test_every_definition_is_printed_for_both_halves(options, lines):
    solution = tables.read_solution(options.data / gldv2.RETRIEVAL)
    found = answers(options, Chain({"bare": 1.0}))
    assert lines[0] == str(mean_ap.evaluate(*found, solution))
    table = definitions.evaluate(*found, solution)
    assert lines[1 : 1 + len(table)] == definitions.show(table).split("\n")
    assert 0 < table["private"][0] < 1


def test_gap_is_that_of_the_nearest_vote(options, lines):
    """The three nearest clean images by hand, the larger sum of cosines, ties to the nearer."""
    query, clean = (
        store.load(options.work / "features" / "bare" / name)
        for name in ("query", "clean")
    )
    listed = lists.load(options.lists, "clean").rows
    landmark = dict(zip(listed["id"], listed["landmark_id"], strict=True))
    rows = []
    readable = clean.readable()
    for name, vector in zip(query.ids, np.array(query.vectors, float), strict=True):
        cosines = np.array(clean.vectors, float) @ vector
        best = np.argsort(np.where(readable, -cosines, 9), kind="stable")[:3]
        sums = {}
        for row in best:
            label = landmark[clean.ids[row]]
            sums[label] = sums.get(label, 0) + cosines[row] / 3
        answer = max(sums, key=sums.get)
        rows.append((name, answer, sums[answer]))
    table = pd.DataFrame(rows, columns=["id", "landmark", "confidence"])
    truth = tables.read_recognition(options.data / gldv2.RECOGNITION)
    score = gap.evaluate(table, truth)
    at = lines.index(str(score))
    assert 0 < score.private < 1
    assert lines[at + 1] == (
        f"private {score.accuracy['Private']:.4f}  "
        f"public {score.accuracy['Public']:.4f}  "
        "accuracy: correct / queries that show a landmark"
    )


def test_each_group_of_numbers_has_its_protocol(options, lines):
    told = [line for line in lines if line.startswith("measured with: ")]
    assert len(told) == 2 and lines[-1] == told[1]
    retrieval, recognition = told
    index = lists.find(options.lists, "index")
    count = len(lists.load(options.lists, "index"))
    assert re.search(
        r"ground truth retrieval_solution_v2\.1\.csv [0-9a-f]{8}; ", retrieval
    )
    assert re.search(r"recognition_solution_v2\.1\.csv [0-9a-f]{8}; ", recognition)
    for line in told:
        assert f"index index {index.hash[:8]}, {count} of 761,757 images" in line
        assert "not all of GLDv2" in line and "trained on nothing" in line
        assert "rerank none (networks bare 1)" in line
        assert "images 32 px square scales 1" in line
    assert "references clean" in recognition and "references" not in retrieval


def test_a_second_evaluation_finds_everything_there(options, lines, monkeypatch):
    monkeypatch.setattr("kit.models.net.load", None)
    monkeypatch.setattr(lists, "build", None)
    assert list(evaluate(options)) == lines


def test_whoever_predicts_may_be_given(options, lines):
    def nobody(scene):
        assert len(scene.labelled.rows)
        ids = scene.models[0].query.ids
        return pd.DataFrame({"id": ids, "landmark": "", "confidence": 0.0})

    found = list(evaluate(options, nobody))
    assert "private GAP 0.0000  public GAP 0.0000" in found
    assert found[:10] == lines[:10]


def test_a_chain_reranks_and_is_told(options, lines):
    chain = Chain({"bare": 1.0}, (build({"step": "alpha_qe", "neighbours": 3}),))
    found = list(evaluate(replace(options, chain=chain)))
    solution = tables.read_solution(options.data / gldv2.RETRIEVAL)
    assert found[0] == str(mean_ap.evaluate(*answers(options, chain), solution))
    assert found[0] != lines[0]
    assert all(
        "rerank alpha_qe" in line for line in found if line.startswith("measured")
    )


def test_without_references_there_is_no_gap(options, lines):
    found = list(evaluate(replace(options, reference="")))
    assert found == [line for line in lines[: len(found)]]
    assert found[-1].startswith("measured with: ground truth retrieval")


def test_a_smaller_index_is_searched_where_its_ids_are_given(options, tmp_path):
    index = sources.official(options.data).index
    kept = index["id"][::2]
    (tmp_path / "ids.txt").write_text("\n".join(kept))
    smaller = replace(options, work=tmp_path / "work", index_ids=tmp_path / "ids.txt")
    found = list(evaluate(replace(smaller, reference="")))
    count = len(lists.load(smaller.lists, "index_val"))
    assert len(kept) <= count < len(index)
    assert f", {count} of 761,757 images" in found[-1]


def test_other_ids_of_the_index_are_another_index(options, tmp_path):
    index = sources.official(options.data).index["id"]
    ids, sizes = tmp_path / "ids.txt", []
    smaller = replace(options, work=tmp_path / "work", index_ids=ids, reference="")
    for kept in (index[::2], index[::2], index):
        ids.write_text("\n".join(kept))
        found = list(evaluate(smaller))
        sizes.append(len(lists.load(smaller.lists, "index_val")))
        assert f", {sizes[-1]} of 761,757 images" in found[-1]
    assert sizes[0] == sizes[1] < sizes[2] == len(index)
    ids.unlink()
    with pytest.raises(FileNotFoundError, match="ids.txt"):
        list(evaluate(smaller))


def test_lists_of_a_build_that_was_cut_short_are_built_again(options, tmp_path):
    index = sources.official(options.data).index["id"]
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(index))
    smaller = replace(options, work=tmp_path / "work", index_ids=ids, reference="")
    whole = list(evaluate(smaller))
    other = tmp_path / "other.txt"
    other.write_text("\n".join(index[::2]))
    facts = sources.official(options.data)
    lists.build(facts, options.data, smaller.lists, index_ids=other)  # and killed
    assert list(evaluate(smaller)) == whole


def test_a_network_that_met_what_it_is_measured_on_is_refused(options, tmp_path, lines):
    (path,) = networks.saved(tmp_path, "leaky")
    met(path, {lists.find(options.lists, "index").hash: "clean"})
    looks = Networks(*extraction.networks([path]), workers=0)
    leaky = replace(options, networks=looks, reference="")
    with pytest.raises(ValueError, match="list clean holds .* validation queries"):
        list(evaluate(leaky))
    found = list(evaluate(replace(leaky, optimistic=True)))
    assert all("LEAKY" in line for line in found[:-1])


@pytest.mark.parametrize("name", [gldv2.RETRIEVAL, gldv2.RECOGNITION])
def test_a_missing_ground_truth_is_named(options, tmp_path, name):
    for other in {gldv2.RETRIEVAL, gldv2.RECOGNITION} - {name}:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("id\n")
    with pytest.raises(FileNotFoundError, match=f"{name}: no ground truth"):
        list(evaluate(replace(options, data=tmp_path)))


@pytest.mark.parametrize(
    ("name", "pattern", "other", "words"),
    [
        (gldv2.RETRIEVAL, "Public|Private", "Ignored", "no query counts"),
        (gldv2.RECOGNITION, "Public|Private", "Ignored", "no query counts"),
        (gldv2.RECOGNITION, r",\d+( \d+)*,", ",,", "no query counts"),
        (gldv2.RETRIEVAL, r"(?<=[, ])([0-9a-f]{16})", r"\1.jpg", "in another form"),
    ],
)
def test_a_ground_truth_that_nothing_can_score_by_must_be_refused_before_extraction(
    options, tmp_path, monkeypatch, name, pattern, other, words
):
    data = shutil.copytree(options.data, tmp_path / "data")
    path = data / name
    path.write_text(re.sub(pattern, other, path.read_text()))
    monkeypatch.setattr(extraction, "extracted", None)
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        list(evaluate(replace(options, data=data, work=tmp_path / "work")))


def test_a_list_that_the_data_does_not_give_is_named(options, tmp_path):
    other = replace(options, work=tmp_path, reference="nothing")
    with pytest.raises(ValueError, match="gives no list nothing"):
        list(evaluate(other))
