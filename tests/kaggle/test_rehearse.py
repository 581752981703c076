import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kit import files
from kit.answers import submission
from kit.kaggle import manifest, mounts, rehearse, sandbox
from kit.kaggle.rehearse import Rehearsal
from kit.kaggle.runtime import Mode
from kit.kaggle.sandbox import Limits

ROOT = Path(__file__).resolve().parents[2]
COMPETITION = "landmark-retrieval-2021"
FIRST = """\
import os, shutil, time
from pathlib import Path
root = Path(os.environ["KIT_KAGGLE_ROOT"])
sample = next((root / "input").rglob("sample_submission.csv"))
"""
COPY = "shutil.copy(sample, 'submission.csv')\n"


@pytest.fixture(params=["namespaces", "plain"])
def isolated(request, tmp_path):
    """Both forms, where this machine allows them."""
    if request.param == "plain":
        return False
    (tmp_path / "trial" / "input").mkdir(parents=True)
    try:
        with sandbox.confined(["true"], tmp_path / "trial", Limits(), isolated=True):
            return True
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")


@pytest.fixture
def data(tmp_path):
    """4 queries and 7 index images in GLDv2's layout, and files that are none."""
    for folder, count in {"test": 4, "index": 7}.items():
        for number in range(count):
            name = f"{number:x}{folder[0] == 'i':d}c0123456789def"
            path = tmp_path / "data" / folder / name[0] / name[1] / name[2]
            path.mkdir(parents=True)
            (path / f"{name}.jpg").write_text(f"photo {name}")
        (tmp_path / "data" / folder / f"{folder}.csv").write_text("id\n")
    return tmp_path / "data"


@pytest.fixture
def build(tmp_path):
    """A build of three datasets, whose notebook has the given cells."""

    def build(*cells):
        folder = tmp_path / "build"
        for name in ("kit", "models", "lists"):
            (folder / name).mkdir(parents=True)
            (folder / name / f"{name}.txt").write_text(f"of {name}")
            metadata = json.dumps({"id": f"alice/toy-{name}"})
            (folder / name / manifest.DATASET).write_text(metadata)
        code = {"cell_type": "code", "metadata": {}, "execution_count": None}
        code |= {"outputs": []}
        cells = [
            code | {"id": str(number), "source": text.splitlines(keepends=True)}
            for number, text in enumerate([FIRST, *cells])
        ]
        head = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        head |= {"language_info": {"name": "python"}}
        notebook = {
            "cells": cells,
            "metadata": head,
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (folder / "submission").mkdir()
        (folder / "submission" / "05.ipynb").write_text(json.dumps(notebook))
        kernel = {
            "code_file": "05.ipynb",
            "competition_sources": [COMPETITION],
            "dataset_sources": [
                "alice/toy-kit/2",
                "alice/toy-models",
                "alice/toy-lists",
            ],
        }
        (folder / "submission" / manifest.KERNEL).write_text(json.dumps(kernel))
        return folder

    return build


def kernel(build):
    return json.loads((build / "submission" / manifest.KERNEL).read_text())


PLACES = {
    "short": [COMPETITION, "toy-kit", "toy-models", "toy-lists"],
    "long": [
        f"competitions/{COMPETITION}",
        *(f"datasets/alice/toy-{name}" for name in ("kit", "models", "lists")),
    ],
    "mixed": [
        *(f"competitions/{COMPETITION}", "toy-kit"),
        *("datasets/alice/toy-models", "toy-lists"),
    ],
}


@pytest.mark.parametrize("layout", mounts.LAYOUTS)
def test_sources_are_where_kaggle_has_them(build, data, tmp_path, layout):
    photos = {
        name: mounts.images(data, name, Mode.COMMIT) for name in ("test", "index")
    }
    made, inputs = build(), tmp_path / "input"
    mounts.fill(inputs, made, kernel(made), photos, layout)
    found = [path for path in inputs.rglob("*") if path.is_file()]
    competition, *datasets = (inputs / place for place in PLACES[layout])
    names = [place / f"{place.name[4:]}.txt" for place in datasets]
    shown = [path for path in found if path not in names]
    assert len(found) == len(shown) + 3 and {*names} <= {*found}
    assert names[1].read_text() == "of models"
    wanted = [path.relative_to(data) for paths in photos.values() for path in paths]
    assert {path.relative_to(competition) for path in shown} == {
        *wanted,
        Path("sample_submission.csv"),
    }
    assert all((competition / p).read_text() == f"photo {p.stem}" for p in wanted)
    lines = (competition / "sample_submission.csv").read_text().splitlines()
    assert lines[0] == "id,images" and len(lines) == 5
    asked = [path.stem for path in photos["test"]]
    assert lines[1:] == [f"{query},{photos['index'][0].stem}" for query in asked]


def test_a_rerun_sees_half_of_the_photos_always_the_same_ones(data):
    everything = mounts.images(data, "index", Mode.COMMIT)
    assert len(everything) == 7 and everything == sorted(everything)
    half = mounts.images(data, "index", Mode.RERUN)
    assert len(half) == 4 and half == sorted(half) and {*half} < {*everything}
    assert half not in (everything[:4], everything[3:])
    for path in everything:
        if path not in half:
            path.unlink()
    assert len(mounts.images(data, "index", Mode.RERUN)) == 2


def test_what_the_build_lacks_is_refused_by_name(build, data, tmp_path):
    made = build()
    path = made / "submission" / manifest.KERNEL
    for field, names, said in [
        ("dataset_sources", ["alice/other"], "dataset alice/other is not in"),
        ("dataset_sources", ["alice/toy-kit", "alice/toy-kit"], "another source"),
        ("model_sources", ["a/b/c/d/1"], "model a/b/c/d/1 is not in the build"),
        ("competition_sources", [], "must name one competition"),
    ]:
        path.write_text(json.dumps(kernel(made) | {field: names}))
        with pytest.raises(ValueError, match=said):
            rehearse.rehearse(made, data)
        path.write_text(json.dumps(kernel(made) | {field: []}))
    with pytest.raises(
        ValueError, match="layout 'flat' is not one of short, long, mixed"
    ):
        rehearse.rehearse(made, data, layout="flat")
    with pytest.raises(FileNotFoundError, match="no images in .*test/a/b/c"):
        rehearse.rehearse(made, tmp_path)


SHOW = """\
env = {name: value for name, value in os.environ.items() if name.startswith("KAGGLE")}
Path("seen.txt").write_text(f"{sorted(env.items())} {len(sample.read_text().split())}")
shutil.copy("seen.txt", root / "temp")
shutil.copy(sample, "submission.csv")
print(Path("seen.txt").read_text(), Path.cwd() == root / "working")
"""


@pytest.mark.parametrize("mode", [Mode.COMMIT, Mode.RERUN])
def test_a_notebook_runs_in_each_mode_and_its_answers_are_kept(
    build, data, tmp_path, monkeypatch, mode
):
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    run = rehearse.rehearse(
        build(SHOW), data, layout="mixed", mode=mode, keep=tmp_path / "kept"
    )
    assert run.ok and run.valid and not run.problem and not run.error
    assert 0 < run.first_valid_s <= run.seconds < 100
    assert 0.03 < run.peak_gb < 1
    assert run.submission == tmp_path / "kept" / f"mixed-{mode}" / "submission.csv"
    assert len(run.submission.read_text().splitlines()) == (3 if mode == "rerun" else 5)
    text = (run.submission.parent / "executed.ipynb").read_text()
    rerun = "('KAGGLE_IS_COMPETITION_RERUN', '1'), " if mode == "rerun" else ""
    assert f"[{rerun}('KAGGLE_KERNEL_RUN_TYPE', 'Batch')]" in text
    assert f"{len(run.submission.read_text().split())} True" in text


def test_an_error_is_told_with_what_it_leaves(build, data):
    made = build(COPY, "def f():\n    raise KeyError('the   thing')\nf()")
    run = rehearse.rehearse(made, data)
    assert not run.ok and run.valid and run.submission is None
    assert run.problem == "KeyError: 'the thing'; submission.csv is valid"
    assert "f()" in run.error and "\x1b" not in run.error
    assert len(run.error.splitlines()) <= rehearse.LINES


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("", "there is no submission.csv"),
        (
            "Path('submission.csv').write_text('id,images\\n')",
            "has no line (4 missing)",
        ),
        ("os.kill(os.getpid(), 9)", "the kernel died (out of memory?); there is no"),
    ],
)
def test_a_run_without_a_valid_file_is_not_ok(build, data, cell, problem):
    run = rehearse.rehearse(build(cell), data)
    assert not run.ok and not run.valid and run.first_valid_s is None
    assert problem in run.problem and "/proc" not in run.problem


def test_answers_that_are_not_in_the_index_are_no_answers(build, data):
    cell = "text = sample.read_text().replace('\\n', ' no\\n').replace(' no', '', 1)\n"
    run = rehearse.rehearse(
        build(cell + "open('submission.csv', 'w').write(text)"), data
    )
    assert not run.valid and run.problem.endswith(
        "answers 'no', which is not in the index"
    )


LIST = """\
place = sample.parent
shown = {it.name: len(list(it.rglob("*.jpg"))) for it in place.iterdir() if it.is_dir()}
print("shown", sorted(shown.items()))
"""


@pytest.fixture
def recognising(build, data):
    """A build whose notebook was told to recognise, and three photos of train."""
    for number in range(3):
        path = data / "train" / "f" / f"{number}" / "0" / f"f{number}00.jpg"
        path.parent.mkdir(parents=True)
        path.write_text("photo")

    def recognising(*cells):
        made = build(*cells)
        path = made / "submission" / "05.ipynb"
        notebook = json.loads(path.read_text())
        told = notebook["cells"][0] | {
            "id": "told",
            "metadata": {"tags": ["injected-parameters"]},
            "source": ["# Parameters\n", "task = 'recognition'"],
        }
        notebook["cells"].insert(0, told)
        path.write_text(json.dumps(notebook))
        return made

    return recognising


@pytest.mark.parametrize(("mode", "queries"), [(Mode.COMMIT, 4), (Mode.RERUN, 2)])
def test_recognition_is_shown_queries_and_all_of_train_but_no_index(
    recognising, data, tmp_path, mode, queries
):
    run = rehearse.rehearse(recognising(LIST, COPY), data, mode=mode, keep=tmp_path)
    assert run.ok, (run.problem, run.error)
    found = submission.read_landmarks(run.submission)
    assert len(found) == queries and set(found["landmark"]) == {"1"}
    text = (run.submission.parent / "executed.ipynb").read_text()
    assert f"shown [('test', {queries}), ('train', 3)]" in text


def test_two_landmarks_of_a_query_are_no_answer(recognising, data):
    cell = "text = sample.read_text().replace('1 0.1', '1 0.1 2 0.2')\n"
    cell += "open('submission.csv', 'w').write(text)"
    run = rehearse.rehearse(recognising(cell), data)
    assert not run.ok and "not one landmark and its score" in run.problem


WRITE = "next((root / 'input').rglob('kit.txt')).open('a').write('more')\n"


def test_input_that_is_written_to_fails_the_run(build, data, isolated):
    run = rehearse.rehearse(build(COPY, WRITE), data, isolated=isolated)
    assert run.valid and not run.ok
    if isolated:
        assert run.problem.startswith("OSError: [Errno 30] Read-only file system")
        assert (run.network, run.readonly) == ("namespace", "mount")
    else:
        assert run.problem == "input was changed: toy-kit/kit.txt"
        assert (run.network, run.readonly) == ("socket guard", "compared")


CONNECT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"


def test_a_notebook_has_no_network(build, data, isolated):
    run = rehearse.rehearse(build(CONNECT), data, isolated=isolated)
    assert run.problem.startswith(("OSError: [Errno 101]", "gaierror: [Errno -3]"))


def test_a_notebook_ends_at_its_limits(build, data):
    made = build(COPY, "block = bytearray(1_500_000_000)")
    run = rehearse.rehearse(made, data, limits=Limits(memory=1))
    assert run.problem == "MemoryError; submission.csv is valid"
    made = made.rename(made.with_name("other"))
    made = build(COPY, "time.sleep(100)")
    run = rehearse.rehearse(made, data, limits=Limits(hours=8 / 3600))
    assert run.problem == "ended after 0.00222 h, the limit; submission.csv is valid"
    assert 8 <= run.seconds < 30 and run.first_valid_s < 8


REWRITE = """\
while True:
    for text in (sample.read_text(), sample.read_text() + "broken,"):
        Path("new").write_text(text)
        os.replace("new", "submission.csv")
        time.sleep(PAUSE)
        PAUSE = 100
"""


@pytest.mark.parametrize("pause", [0.2, 100])
def test_a_killed_run_is_judged_by_the_file_it_leaves(build, data, isolated, pause):
    made = build(f"PAUSE = {pause}\n" + REWRITE)
    run = rehearse.rehearse(made, data, isolated=isolated, killed_after=1.5)
    assert run.seconds - run.first_valid_s >= 1.5
    if pause == 100:
        assert run.ok and run.valid and not run.problem
    else:
        assert not run.ok and not run.valid
        assert run.problem.startswith("killed 1.5 s after the first valid file: ")
        assert "'broken' is no query" in run.problem


def test_a_run_that_ends_before_it_is_killed_is_judged_as_any_other(build, data):
    run = rehearse.rehearse(build(COPY, "1 / 0"), data, killed_after=1000)
    assert run.problem.startswith("ZeroDivisionError") and run.valid


def test_one_query_and_an_empty_index_are_shown_as_they_are(build, data):
    for path in [*data.glob("index/?/?/?/*.jpg"), *data.glob("test/[1-9]/?/?/*.jpg")]:
        path.unlink()
    cell = "assert (sample.parent / 'index').is_dir()\n"
    cell += "assert sample.read_text() == 'id,images\\n00c0123456789def,\\n'\n"
    assert rehearse.rehearse(build(cell + COPY), data, mode=Mode.RERUN).ok


def test_the_table_has_a_line_a_run():
    good = Rehearsal(
        *("short", Mode.COMMIT, True, True, None, 2.25, 10.0, 0.5, "namespace", "mount")
    )
    bad = Rehearsal(
        *("mixed", Mode.RERUN, False, False, None, None, 123.4, 12.25),
        *("socket guard", "compared", "it failed"),
    )
    assert rehearse.table([good, bad]).splitlines() == [
        "layout  mode    result  first valid s  s      peak GB  network       input",
        "short   commit  ok      2.2            10.0   0.50     namespace     mount",
        "mixed   rerun   FAILED  -              123.4  12.25    socket guard  compared",
    ]
    assert rehearse.summary(good).startswith(
        "short commit: ok, first valid file after 2.2"
    )


def test_the_script_tells_each_failure_in_a_line(build, data, tmp_path):
    fails = "if os.environ.get('KAGGLE_IS_COMPETITION_RERUN'): 1 / 0"
    command = [sys.executable, ROOT / "scripts" / "rehearse.py", build(COPY, fails)]
    options = ["--data", data, "--layout", "long", "--keep", tmp_path / "kept"]
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    problem = "ZeroDivisionError: division by zero; submission.csv is valid"
    assert done.stderr == f"rehearse: long rerun: {problem}\n"
    assert "long commit: ok, first valid file" in done.stdout
    assert "long rerun: FAILED" in done.stdout and "1 / 0" in done.stdout
    assert done.stdout.splitlines()[-3].startswith("layout  mode")
    assert (tmp_path / "kept" / "long-commit" / "submission.csv").is_file()
    done = subprocess.run(
        [*command, "--data", tmp_path],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("rehearse: no images in")


# --- killed


def end_of(test, seconds=90):
    """Waits until a condition holds."""
    give_up = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def named(text):
    """Processes with this text among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if text in path.read_text() else []
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_rehearsal_leaves_nothing(build, data, tmp_path, monkeypatch, number):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    command = [sys.executable, ROOT / "scripts" / "rehearse.py"]
    command += [build(COPY, "time.sleep(600)"), "--data", data, "--layout", "long"]
    variables = os.environ | {"TMPDIR": str(tmp_path / "t")}
    process = subprocess.Popen(command, env=variables)
    try:
        end_of(lambda: list((tmp_path / "t").glob("*/log.txt")))
        (folder,) = (tmp_path / "t").iterdir()
        assert rehearse.sweep_folders() == [] and named(folder.name)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    end_of(lambda: not named(folder.name))
    assert rehearse.sweep_folders() == ([folder] if killed else [])
    assert list((tmp_path / "t").iterdir()) == []
    assert str(folder) not in Path("/proc/mounts").read_text()


def test_a_folder_that_is_held_or_of_others_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = 2**22 + 1  # no id of a process
    names = [f"{rehearse.PREFIX}{gone}-a", f"{rehearse.PREFIX}{gone}-b"]
    names += [
        f"{rehearse.PREFIX}{os.getpid()}-c",
        "kaggle-mine",
        f"{rehearse.PREFIX}x-y",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    with files.lock(tmp_path / names[0]):
        assert rehearse.sweep_folders() == [tmp_path / names[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [names[0], *names[2:]]
    )


def test_an_error_of_a_notebook_does_nothing_to_a_terminal(build, data):
    cell = "raise ValueError('\\x1b]0;title\\x07\\rsafe\\x9b2J')"
    run = rehearse.rehearse(build(cell), data)
    assert "safe" in run.problem and run.problem.isprintable()
    assert "safe" in run.error and run.error.replace("\n", "").isprintable()
