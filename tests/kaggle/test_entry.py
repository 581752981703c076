import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kit.answers import submission
from kit.data import lists
from kit.kaggle import entry, manifest, runtime
from kit.plan import Run

COMPETITION, OWNER = "landmark-retrieval-2021", "alice"
QUERIES = [f"{n:x}abc{n:012x}" for n in range(3)]
INDEX = [f"{n:x}def{n:012x}" for n in range(8, 13)]


def photo(folder: Path, name: str) -> None:
    path = folder.joinpath(*name[:3], f"{name}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Stands for /kaggle: a competition of three queries and five index images, a dataset."""
    data = tmp_path / "kaggle" / "input" / COMPETITION
    for name in QUERIES:
        photo(data / "test", name)
    for name in INDEX:
        photo(data / "index", name)
    lines = [f"{name},{INDEX[0]} {INDEX[2]}" for name in QUERIES]
    (data / entry.SAMPLE).write_text("\n".join(["id,images", *lines]) + "\n")
    dataset = tmp_path / "build" / "models"
    dataset.mkdir(parents=True)
    (dataset / "answers__toy__chain.json").write_text('{"models": {"m": 1}}')
    manifest.write(tmp_path / "build", COMPETITION)
    dataset.rename(tmp_path / "kaggle" / "input" / "toy-models")
    monkeypatch.setenv(runtime.ROOT, str(tmp_path / "kaggle"))
    monkeypatch.delenv(runtime.RERUN, raising=False)
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    # a check of GPUs starts torch in another process, for seconds
    monkeypatch.setattr(runtime, "gpus", lambda: runtime.Gpus(()))
    monkeypatch.setenv(runtime.VISIBLE, "")
    return tmp_path / "kaggle"


def start(public: int = 3, images: int = 0, hours: float = 9.0) -> entry.Entry:
    task = entry.Task(public_queries=public, commit_images=images)
    datasets = [f"{OWNER}/toy-models"]
    return entry.on_kaggle("toy", COMPETITION, datasets, task, hours, time.time())


def home(tmp_path: Path, **fields) -> entry.Entry:
    return entry.Entry(
        Run("toy", tmp_path, tmp_path),
        tmp_path / "submission.csv",
        np.array(QUERIES),
        **fields,
    )


# The first file


def test_the_first_file_is_the_sample_that_the_competition_gives(root):
    run = start()
    assert run.out == root / "working" / "submission.csv"
    expected = {name: [INDEX[0], INDEX[2]] for name in QUERIES}
    assert submission.read(run.out) == expected
    assert run.asked.tolist() == sorted(QUERIES)


@pytest.mark.parametrize("spoil", ["absent", "other", "text"])
def test_without_a_sample_of_these_queries_every_query_answers_one_image(
    root, capsys, spoil
):
    sample = root / "input" / COMPETITION / entry.SAMPLE
    sample.unlink()
    if spoil == "other":
        sample.write_text(f"id,images\n{INDEX[1]},{INDEX[0]}\n")
    elif spoil == "text":
        sample.write_text("nothing\n")
    found = submission.read(start().out)
    assert found == {name: [min(INDEX)] for name in QUERIES}
    assert f"{entry.SAMPLE} is not used: " in capsys.readouterr().out


def test_the_first_file_is_there_before_what_travelled_is_looked_at(root):
    (root / "input" / "toy-models" / "parts.json").write_text("{}")
    with pytest.raises(ValueError, match="wrong manifest"):
        start()
    submission.check(root / "working" / "submission.csv", QUERIES)


def test_the_files_are_as_the_competition_wants_them(root):
    sample = root / "input" / COMPETITION / entry.SAMPLE
    sample.write_text(sample.read_text().replace("id,images", "query,answers"))
    form = submission.Form(("query", "answers"), 1)
    task = entry.Task(public_queries=3, form=form)
    datasets = [f"{OWNER}/toy-models"]
    run = entry.on_kaggle("toy", COMPETITION, datasets, task, 9.0, time.time())
    first = {name: [min(INDEX)] for name in QUERIES}  # the sample names two
    assert submission.read(run.out, form) == first
    ranked = np.array([[INDEX[3], INDEX[1]]] * 3)  # one more than is asked for
    run.write(np.array(QUERIES), ranked, np.array(INDEX))
    assert submission.read(run.out, form)[QUERIES[0]] == [INDEX[3]]


# Recognition


def recognise(root, public: int = 3) -> entry.Entry:
    """A competition whose index is not there."""
    shutil.rmtree(root / "input" / COMPETITION / "index", ignore_errors=True)
    form = submission.LANDMARKS
    task = entry.Task("test", "", public_queries=public, form=form)
    datasets = [f"{OWNER}/toy-models"]
    return entry.on_kaggle("toy", COMPETITION, datasets, task, 9.0, time.time())


def test_the_first_landmarks_are_the_sample_that_the_competition_gives(root):
    sample = root / "input" / COMPETITION / entry.SAMPLE
    lines = [f"{name},137790 0.1" for name in QUERIES[:2]] + [f"{QUERIES[2]},"]
    sample.write_text("\n".join(["id,landmarks", *lines]) + "\n")
    found = submission.read_landmarks(recognise(root).out)
    assert found["landmark"].tolist() == ["137790", "137790", ""]
    assert found["confidence"].tolist() == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("spoil", ["absent", "other", "two"])
def test_without_a_sample_of_these_queries_nothing_is_predicted(root, capsys, spoil):
    sample = root / "input" / COMPETITION / entry.SAMPLE
    sample.unlink()
    if spoil == "other":
        sample.write_text(f"id,landmarks\n{INDEX[1]},5 0.1\n")
    elif spoil == "two":
        lines = [f"{name},5 0.1 6 0.2" for name in QUERIES]
        sample.write_text("\n".join(["id,landmarks", *lines]) + "\n")
    found = submission.read_landmarks(recognise(root).out)
    assert found["id"].tolist() == sorted(QUERIES)
    assert set(found["landmark"]) == {""}
    assert f"{entry.SAMPLE} is not used: " in capsys.readouterr().out


def test_recognition_lists_queries_and_no_index(root):
    run = recognise(root)
    assert lists.load(run.place.lists, "query").ids.tolist() == sorted(QUERIES)
    assert not (run.place.lists / "index.csv").exists()
    assert run.place.chain.exists()  # what travelled is linked


def test_landmarks_are_written_checked_and_none_for_the_other_queries(root):
    run = recognise(root)
    made = pd.DataFrame(
        {"id": QUERIES[:2], "landmark": ["7", ""], "confidence": [0.5, 0.0]}
    )
    run.write_landmarks(made, ["7", "8"])
    found = submission.read_landmarks(run.out).set_index("id")
    assert found["landmark"].to_dict() == {
        QUERIES[0]: "7",
        QUERIES[1]: "",
        QUERIES[2]: "",
    }
    before = run.out.read_text()
    with pytest.raises(ValueError, match="answers '7', which no reference shows"):
        run.write_landmarks(made, ["8"])
    assert run.out.read_text() == before


# What is mounted


def test_lists_are_of_the_images_that_are_mounted_and_the_rest_is_linked(root):
    run = start()
    place = run.place
    assert place.work == root / "temp" / "work"
    assert lists.load(place.lists, "query").ids.tolist() == sorted(QUERIES)
    index = lists.load(place.lists, "index")
    assert index.ids.tolist() == sorted(INDEX)
    assert index.rows["path"][0] == f"index/{'/'.join(INDEX[0][:3])}/{INDEX[0]}.jpg"
    assert set(index.labels) == {-1}
    assert json.loads(place.chain.read_text()) == {"models": {"m": 1}}
    assert place.chain.is_symlink()
    start()  # again in the same session


def test_a_commit_looks_at_some_images_and_a_rerun_at_all(root, monkeypatch):
    place = start(images=2).place
    for name, ids in (("query", QUERIES), ("index", INDEX)):
        assert lists.load(place.lists, name).ids.tolist() == sorted(ids)[:2]
    monkeypatch.setenv(runtime.RERUN, "1")
    run = start(public=7, images=2)
    assert len(lists.load(run.place.lists, "index")) == 5
    assert run.scored


def test_queries_that_are_not_the_public_ones_make_a_rerun(root):
    assert not start(public=3).scored
    assert start(public=4, images=1).scored


def test_a_folder_without_images_is_refused_by_its_path(root):
    for path in (root / "input" / COMPETITION / "index").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="/index: no image in it"):
        start()
    assert (root / "working" / "submission.csv").exists()
    for path in (root / "input" / COMPETITION / "test").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no image in .*/test"):
        start()


def test_a_session_ends_before_its_limit(root):
    before = time.time()
    ends = start(hours=2).ends
    assert before + 7200 <= ends + entry.RESERVE <= time.time() + 7200


# Steps


def test_answers_of_some_queries_leave_the_others_empty(tmp_path):
    run = home(tmp_path)
    ranked = np.array([[INDEX[1], INDEX[0]], [INDEX[3], ""]])
    run.write(np.array([QUERIES[2], QUERIES[0]]), ranked, np.array(INDEX))
    assert submission.read(run.out) == {
        QUERIES[0]: [INDEX[3]],
        QUERIES[1]: [],
        QUERIES[2]: [INDEX[1], INDEX[0]],
    }
    with pytest.raises(ValueError, match="which is not in the index"):
        run.write(np.array(QUERIES[:1]), ranked[:1], np.array(INDEX[:1]))
    assert submission.read(run.out)[QUERIES[2]] == [INDEX[1], INDEX[0]]


def test_a_failure_ends_a_run_that_is_not_scored(tmp_path):
    run = home(tmp_path)
    run.out.touch()
    with pytest.raises(RuntimeError, match="broken"), run.step("search"):
        raise RuntimeError("broken")
    assert run.done[0].state == "failed"


def test_a_failure_is_told_and_no_error_where_the_run_is_scored(tmp_path, capsys):
    run = home(tmp_path, scored=True)
    with pytest.raises(RuntimeError), run.step("sample"):
        raise RuntimeError("nothing is written yet")
    run.out.touch()
    with run.step("search"):
        raise RuntimeError("broken")
    told = capsys.readouterr().out
    assert "search: failed, RuntimeError: broken; submission.csv stays" in told
    assert [each.state for each in run.done] == ["failed", "failed"]


def test_an_interruption_is_never_kept(tmp_path):
    run = home(tmp_path, scored=True)
    run.out.touch()
    with pytest.raises(KeyboardInterrupt), run.step("search"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("scored", [False, True])
def test_a_step_ends_when_the_time_is_over_and_the_file_stays(tmp_path, scored):
    run = home(tmp_path, scored=scored, ends=time.time() + 0.3)
    run.out.touch()
    with run.step("rerank"):
        while True:
            with suppress(Exception):  # handlers on the way are not for this
                time.sleep(0.01)
    with run.step("again"):  # when none is left
        time.sleep(60)
    assert [each.state for each in run.done] == ["out of time", "out of time"]
    run.out.unlink()
    with pytest.raises(entry.OutOfTime), run.step("sample"):
        time.sleep(60)


def test_what_misses_a_step_that_ran_out_of_time_is_no_error(tmp_path):
    run = home(tmp_path, ends=time.time() + 0.1)
    run.out.touch()
    with run.step("mount"):
        time.sleep(60)
    with run.step("chain", np.inf):
        raise FileNotFoundError("it was not mounted")
    assert [each.state for each in run.done] == ["out of time", "failed"]


def test_the_first_file_is_written_though_there_is_no_time(root):
    run = start(hours=1e-3)
    submission.check(run.out, QUERIES)
    assert [each.state for each in run.done] == ["done", "out of time"]


def test_a_step_that_ends_in_time_rings_no_alarm_later(tmp_path):
    run = home(tmp_path, ends=time.time() + 0.3)
    with run.step("search"):
        pass
    time.sleep(0.4)
    assert run.done[0].state == "done"


def test_the_table_has_a_line_for_every_step(tmp_path):
    run = home(tmp_path)
    for name in ("search", "rerank"):
        with run.step(name):
            time.sleep(0.25)
    head, *lines = run.table().splitlines()
    assert head.split() == ["step", "state", "seconds", "peak", "MB"]
    assert [line.split()[:2] for line in lines] == [
        ["search", "done"],
        ["rerank", "done"],
    ]
    assert all(float(line.split()[-1]) > 10 for line in lines)
