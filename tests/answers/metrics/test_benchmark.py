import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from kit import launch
from kit.answers.metrics import benchmark, extraction, folders, revisited
from kit.answers.metrics.benchmark import by_name, by_path, evaluate
from kit.answers.metrics.extraction import Networks
from kit.answers.metrics.ground_truth import GroundTruth, Query
from kit.answers.retrieval import Scenes
from kit.data import images, lists
from kit.features import store
from kit.features.views import Views
from kit.rerank.chain import Chain
from kit.rerank.steps import build
from tests.answers.metrics import networks

LOCAL = {"step": "local", "top": 6, "side": 64}
VIEWS = Views(48, "bounded", (0.75, 1.0), multiple=8, least=8)


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """Two networks in different folders."""
    runs = tmp_path_factory.mktemp("runs")
    paths = networks.saved(runs, "toy/c2x", "other/clean")
    return Networks(*extraction.networks(paths), VIEWS, workers=0, batch=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Fourteen pictures and two that ask, some in folders; one is broken."""
    root = tmp_path_factory.mktemp("jpg")
    for number in range(14):
        folder = root / "more" if number % 3 == 0 else root
        side = 40 + 3 * number
        networks.picture(folder / f"image_{number:06}.jpg", number % 9, side, 60)
    for number in range(3):
        networks.picture(root / f"asked_{number}.jpg", number, 60, 70)
    (root / "image_000004.jpg").write_text("broken")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture
def truth():
    names = [f"image_{number:06}" for number in (5, 0, 3, 1, 9, 10, 4, 12, 7)]

    def rows(*groups):
        named = zip(("easy", "hard", "junk"), groups, strict=True)
        return {name: np.array(group, dtype=np.int64) for name, group in named}

    return GroundTruth(
        "revisited",
        names,
        [
            Query("asked_0", (5.2, 6.0, 40.9, 50.0), rows([1, 6], [4], [0])),
            Query("asked_1", None, rows([], [3], [2, 8])),
            Query("asked_2", (0.0, 0.0, 30.0, 30.0), rows([7, 5], [], [])),
        ],
    )


def slow(out, models, truth, distractors=None):
    """Ranks every image by the stores' own vectors, and walks the ranking."""
    total, lost = 0.0, 0
    for model in models:
        query = store.load(out / "features" / model / "query")
        parts = [store.load(out / "features" / model / "index")]
        if distractors:
            parts.append(store.load(distractors / "features" / model / "index"))
        index = np.concatenate([np.array(part.vectors, float) for part in parts])
        total = total + np.array(query.vectors, float) @ index.T
        lost = lost | ~index.any(axis=1)
    found = {}
    for name, setup in revisited.REVISITED.items():
        rows = []
        for asked, scores in zip(truth.queries, total, strict=True):
            ranking = [
                row
                for row in sorted(range(len(lost)), key=lambda r: (-scores[r], r))
                if not lost[row]
            ]
            place = {row: at for at, row in enumerate(ranking)}
            rows.append(
                {
                    group: np.array([place.get(r, -1) for r in members.tolist()], int)
                    for group, members in asked.groups.items()
                }
            )
        found[name] = revisited.evaluate(rows, setup)
    return found


def same(found, expected):
    assert list(found.scores) == list(expected)
    for name, score in expected.items():
        np.testing.assert_array_equal(found.scores[name].ap, score.ap)
        assert found.scores[name].mean_precision == score.mean_precision


@pytest.fixture
def asked(truth, pictures):
    return by_name(truth, "gnd.pkl 12345678", "rtoy", pictures)


def test_the_score_is_that_of_the_stores_vectors(asked, pictures, tmp_path, looks):
    found = evaluate(asked, pictures, tmp_path, looks)
    same(found, slow(tmp_path / "rtoy", looks.names, asked.truth))
    index = store.load(tmp_path / "rtoy/features/toy/c2x/index")
    assert (
        len(index) == 9
        and index.readable().tolist() == [True] * 6 + [False] + [True] * 2
    )


def test_distractors_are_searched_besides(asked, pictures, tmp_path, looks):
    more = tmp_path / "million"
    for number in range(20):
        networks.picture(more / f"{number % 3}/d{number}.jpg", number, 40, 50)
    plain = evaluate(asked, pictures, tmp_path / "work", looks)
    found = evaluate(asked, pictures, tmp_path / "work", looks, distractors=more)
    out = tmp_path / "work/rtoy"
    same(found, slow(out, looks.names, asked.truth, tmp_path / "work/distractors"))
    assert found.scores["Medium"].mean_ap < plain.scores["Medium"].mean_ap
    assert "9 images and 20 distractors" in str(found.protocol)


def test_queries_are_cropped_unless_they_are_to_be_whole(
    asked, pictures, tmp_path, looks
):
    found = evaluate(asked, pictures, tmp_path, looks)
    folder = tmp_path / "rtoy/images/queries"
    listed = lists.load(tmp_path / "rtoy/lists", "query").rows["path"]
    shown = [images.read(tmp_path / "rtoy/images" / path) for path in listed]
    asking = [images.read(pictures / f"asked_{n}.jpg") for n in range(3)]
    assert np.array_equal(shown[0], asking[0][6:50, 5:41])
    assert np.array_equal(shown[1], asking[1])
    assert np.array_equal(shown[2], asking[2][:30, :30])
    cropped = [path.name for path in folder.iterdir()]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = evaluate(asked, pictures, tmp_path, looks, whole=True)
    listed = lists.load(tmp_path / "rtoy/lists", "query").rows["path"]
    shown = [images.read(tmp_path / "rtoy/images" / path) for path in listed]
    assert all(map(np.array_equal, shown, asking))
    same(again, slow(tmp_path / "rtoy", looks.names, asked.truth))
    assert "queries 3 cropped" in str(found.protocol)
    assert "queries 3 whole" in str(again.protocol)
    assert found.lines("rtoy")[0].endswith("queries), cropped")
    assert again.lines("rtoy")[2].endswith("queries), whole")
    third = evaluate(asked, pictures, tmp_path, looks)  # the crops are still there
    same(third, found.scores)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert all(after[name] == before[name] for name in cropped)


def test_a_second_evaluation_extracts_nothing(
    asked, pictures, tmp_path, looks, monkeypatch
):
    found = evaluate(asked, pictures, tmp_path, looks)
    table = tmp_path / "rtoy/lists/index.csv"
    before = table.stat().st_mtime_ns
    monkeypatch.setattr("kit.models.net.load", None)  # no network is needed
    same(evaluate(asked, pictures, tmp_path, looks), found.scores)
    assert table.stat().st_mtime_ns == before


def test_a_picture_is_extracted_once_in_whatever_tables_it_stands(
    pictures, tmp_path, looks, monkeypatch
):
    seen = []
    decode = images.decode

    def counted(data, path, *more):
        seen.append(path)
        return decode(data, path, *more)

    monkeypatch.setattr(images, "decode", counted)
    shown = [f"image_{n:06}.jpg" for n in (1, 2, 5, 7, 8, 10, 11)]

    def scored(work, name, paths, query, folder=pictures):
        table = tmp_path / f"{name}.csv"
        rows = [f"{path},{n % 2},{query}" for n, path in enumerate(paths)]
        table.write_text("\n".join(["path,label,query", *rows]))
        asked = by_path(folders.read(table), "t", name)
        seen.clear()
        found = evaluate(asked, folder, tmp_path / work, looks)
        return found.scores, len(seen)

    assert scored("work", "first", shown[:5], "both")[1] == 5
    again, count = scored("work", "second", shown, "both")
    assert count == 2  # of seven
    alone, count = scored("alone", "second", shown, "both")
    assert count == 7
    np.testing.assert_array_equal(again["all"].ap, alone["all"].ap)
    copy = shutil.copytree(pictures, tmp_path / "copy")
    assert scored("work", "third", shown[:5], "both", copy)[1] == 5  # other files
    networks.picture(copy / shown[0], 77)
    assert scored("work", "fourth", shown[:5], "both", copy)[1] == 5  # a changed one


def test_another_folder_of_pictures_is_looked_at_anew(asked, pictures, tmp_path, looks):
    evaluate(asked, pictures, tmp_path / "work", looks)
    link = tmp_path / "work/rtoy/images/index"
    assert os.readlink(link) == str(pictures)
    other = tmp_path / "other"
    for path in benchmark.pictures(pictures):
        networks.picture(other / path, sum(map(ord, path)) % 99, 45, 45)
    evaluate(asked, other, tmp_path / "work", looks)
    assert os.readlink(link) == str(other)
    index = lists.load(tmp_path / "work/rtoy/lists", "index").rows
    assert set(zip(index["height"], index["width"], strict=True)) == {(45, 45)}
    same(
        evaluate(asked, other, tmp_path / "work", looks),
        slow(tmp_path / "work/rtoy", looks.names, asked.truth),
    )


def test_a_chain_reranks_the_whole_index(asked, pictures, tmp_path, looks):
    plain = evaluate(asked, pictures, tmp_path, looks)
    steps = (build({"step": "alpha_qe", "neighbours": 2}),)
    models = {name: 1.0 for name in looks.names}
    found = evaluate(asked, pictures, tmp_path, looks, chain=Chain(models, steps, k=3))
    expected = evaluate(asked, pictures, tmp_path, looks, chain=Chain(models))
    same(expected, plain.scores)
    assert not np.array_equal(found.scores["Easy"].ap, plain.scores["Easy"].ap)
    folder = tmp_path / "rtoy"
    asking, searched = (lists.load(folder / "lists", n) for n in ("query", "index"))
    scenes = Scenes(folder / "features", asking, searched)
    _, ranked = scenes.answers(Chain(models, steps, k=9))
    assert (ranked == "").sum() == 3  # each ranking lacks the broken picture
    at = [
        {
            group: _columns(row, searched.ids[members])
            for group, members in q.groups.items()
        }
        for q, row in zip(asked.truth.queries, ranked, strict=True)
    ]
    same(found, {n: revisited.evaluate(at, s) for n, s in revisited.REVISITED.items()})
    assert "rerank alpha_qe" in str(found.protocol)
    assert "rerank none (networks toy/c2x 1, other/clean 1)" in str(plain.protocol)


def _columns(ranking, ids):
    ranking = ranking.tolist()
    return np.array([ranking.index(i) if i in ranking else -1 for i in ids], int)


def test_a_chain_of_other_networks_is_refused(asked, pictures, tmp_path, looks):
    with pytest.raises(ValueError, match="the chain wants network all; given are toy"):
        evaluate(asked, pictures, tmp_path, looks, chain=Chain({"all": 1.0}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [{"step": "alpha_qe"}, {"step": "dba"}, LOCAL])
def test_a_chain_reranks_distractors_as_if_they_were_of_the_index(
    truth, asked, pictures, tmp_path, looks, step
):
    names = [f"asked_{number}" for number in (1, 2)]
    more = replace(truth, images=[*truth.images, *names])
    whole = by_name(more, "gnd", "whole", pictures)
    beside = tmp_path / "beside"
    for path in whole.index[-2:]:
        networks.picture(beside / path, int(path[6]), 60, 70)
    chain = Chain({"toy/c2x": 1.0}, (build(step),))
    found, expected = (
        evaluate(
            one, pictures, tmp_path / "work", looks, chain=chain, distractors=other
        )
        for one, other in ((asked, beside), (whole, None))
    )
    same(found, expected.scores)
    assert "and 2 distractors" in str(found.protocol)


def test_a_picture_takes_part_in_nothing_that_answers_it(pictures, tmp_path, looks):
    """Each photo asks with another half of itself, beside the same table without the photo."""
    paths = [f"image_{n:06}.jpg" for n in (1, 2, 5, 7, 8, 10, 11)]
    chain = Chain({"other/clean": 1.0}, (build({"step": "dba"}), build(LOCAL)))

    def scored(name, rows):
        table = tmp_path / f"{name}.csv"
        table.write_text("\n".join(["path,label,query", *rows]))
        asked = by_path(folders.read(table), "t", name)
        found = evaluate(asked, pictures, tmp_path / "work", looks, chain=chain)
        return found.scores["all"].ap

    labels = [f"{path},{n % 2}" for n, path in enumerate(paths)]
    both = scored("both", [f"{row},both" for row in labels])
    for query in (0, 3):
        rows = [f"{row},{int(n == query)}" for n, row in enumerate(labels)]
        assert scored("one", rows) == pytest.approx(both[query])


def test_a_benchmark_is_not_called_as_the_distractors_are(
    asked, pictures, tmp_path, looks
):
    named = replace(asked, name="distractors")
    with pytest.raises(ValueError, match="call the file another"):
        evaluate(named, pictures, tmp_path, looks)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_all_pictures_are_searched(
    truth, asked, pictures, tmp_path, looks
):
    classic = by_name(replace(truth, kind="classic"), "gnd", "old", pictures)
    inside = pictures / "sub" / ".." / "work"
    with pytest.raises(ValueError, match="write to a folder elsewhere"):
        evaluate(classic, pictures, inside, looks)
    with pytest.raises(ValueError, match="write to a folder elsewhere"):
        evaluate(asked, pictures, inside, looks, distractors=pictures)
    assert not (pictures / "work").exists()


def test_a_chain_does_not_rank_what_does_not_fit(
    asked, pictures, tmp_path, looks, monkeypatch
):
    monkeypatch.setattr(benchmark, "MOST", 26)
    chain = Chain({"toy/c2x": 1.0}, (build({"step": "alpha_qe"}),))
    with pytest.raises(ValueError, match="a chain would rank 9 images for 3 queries"):
        evaluate(asked, pictures, tmp_path, looks, chain=chain)
    monkeypatch.setattr(benchmark, "MOST", 27)
    evaluate(asked, pictures, tmp_path, looks, chain=chain)


@pytest.mark.parametrize("step", [None, {"step": "alpha_qe"}])
def test_a_query_that_cannot_be_read_finds_nothing(
    truth, pictures, tmp_path, looks, caplog, step
):
    broken = replace(truth.queries[0], image="image_000004")
    queries = [broken, *truth.queries[1:], *truth.queries]  # a fifth may be lost
    asked = by_name(replace(truth, queries=queries), "gnd.pkl", "rtoy", pictures)
    chain = step and Chain({"toy/c2x": 1.0}, (build(step),))
    with caplog.at_level(logging.WARNING):
        found = evaluate(asked, pictures, tmp_path, looks, chain=chain)
    assert "query 0 cannot be read, it finds nothing" in caplog.text
    assert found.scores["Medium"].ap[0] == 0 < found.scores["Medium"].ap[3]
    assert found.scores["Medium"].queries == 6


# Which pictures


def test_pictures_are_found_by_name_wherever_they_lie(asked, pictures):
    assert asked.index[:3] == [
        "image_000005.jpg",
        "more/image_000000.jpg",
        "more/image_000003.jpg",
    ]
    assert len(asked.index) == 9  # no other picture of the folder is searched
    assert asked.asking == ["asked_0.jpg", "asked_1.jpg", "asked_2.jpg"]


def test_the_older_benchmarks_search_all_pictures(truth, pictures):
    groups = {"good": np.array([1]), "ok": np.array([0]), "junk": np.array([2])}
    query = Query("image_000000", None, groups)
    classic = GroundTruth("classic", truth.images[:4], [query])
    found = by_name(classic, "gt", "old", pictures)
    assert [path.split("/")[-1][:-4] for path in found.index[:4]] == truth.images[:4]
    assert sorted(found.index) == benchmark.pictures(pictures)


def test_a_picture_that_is_not_there_is_named(truth, pictures):
    more = replace(truth, images=[*truth.images, "image_99", "image_98"])
    with pytest.raises(
        FileNotFoundError,
        match=r"no picture image_99 of the ground truth \(2 of 14 missing\)",
    ):
        by_name(more, "gnd", "rtoy", pictures)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no picture in it"):
        benchmark.pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        benchmark.pictures(tmp_path / "none")


def test_a_table_of_labels_is_a_benchmark(pictures, tmp_path, looks):
    table = tmp_path / "labels.csv"
    rows = ["path,label,query,x,y,w,h"]
    rows += [f"asked_{n}.jpg,{n},1,1,2,30,20" for n in range(3)]
    rows += [f"image_{n:06}.jpg,{n % 3},both,,,," for n in (1, 2, 5, 7, 8)]
    table.write_text("\n".join(rows))
    truth = folders.read(table)
    found = evaluate(by_path(truth, "labels.csv", "labels"), pictures, tmp_path, looks)
    (score,) = found.scores.values()
    # 8 asks beside a label's others: 5 pictures of labels 1, 2, 2, 1, 2 and one of each
    assert score.queries == 7  # nobody else has label 0
    assert np.isnan(score.ap[0])
    total = sum(
        np.array(store.load(tmp_path / f"labels/features/{m}/query").vectors, float)
        @ np.array(store.load(tmp_path / f"labels/features/{m}/index").vectors, float).T
        for m in looks.names
    )
    label = np.array([1, 2, 2, 1, 2])
    for query, own in enumerate([None, None, None, 0, 1, 2, 3, 4]):
        wanted = label == (query if own is None else label[own])
        kept = np.arange(5) != own
        order = np.argsort(-total[query][kept], kind="stable")
        hits = wanted[kept][order]
        if hits.any():
            area, last = 0.0, 1.0
            for place in range(len(hits)):
                now = hits[: place + 1].mean()
                area += hits[place] * (last + now) / 2 / hits.sum()
                last = now
            assert score.ap[query] == pytest.approx(area)


# Networks


def test_networks_are_named_from_the_folder_that_holds_them_all(looks, tmp_path):
    assert looks.names == ("toy/c2x", "other/clean")
    one = extraction.networks([looks.runs / "toy/c2x"])
    assert one == (looks.runs / "toy", ("c2x",))
    with pytest.raises(FileNotFoundError, match="no model in .*none"):
        extraction.networks([tmp_path / "none"])
    with pytest.raises(ValueError, match="at least one network"):
        extraction.networks([])


def test_as_many_processes_extract_as_there_are_gpus(
    asked, pictures, tmp_path, looks, monkeypatch
):
    asked_for = []

    def launched(module, arguments, *, processes, logs):
        asked_for.append(processes)
        launch.launch(module, arguments, processes=1, logs=logs)

    monkeypatch.setattr(extraction, "launch", launched)
    evaluate(asked, pictures, tmp_path, replace(looks, gpus=3))
    assert asked_for == [3, 3]
