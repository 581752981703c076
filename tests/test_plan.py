import importlib.util
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kit import files, pipeline, plan
from kit.data import lists, sources, toy
from kit.plan import Run
from kit.rerank.steps import STEPS
from kit.training import recipes

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "scripts" / "run_pipeline.py")]
WINNER = "glr2021/seresnet101_ibn_a"


@pytest.fixture
def run(tmp_path):
    return Run(WINNER, tmp_path / "data", tmp_path / "work")


def steps(run):
    continents = ROOT / "datasets_meta" / "continents.csv"
    return plan.steps(run, ROOT / "notebooks", continents)


def by_name(run):
    return {step.name: step for step in steps(run)}


def table(run):
    return {each.name: each.state for each in pipeline.status(steps(run), run.folder)}


# Steps


def test_the_steps_are_lists_stages_features_tuning_and_submission(run):
    assert list(by_name(run)) == [
        "00_image_lists",
        *(f"02_train_{stage}" for stage in ("clean", "c2x", "full", "all")),
        "03_features_untrained",
        "03_features_trained",
        "04_tune_rerank",
        "05_submission",
    ]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_has_a_chain_that_the_pipeline_accepts(run, name):
    run = replace(run, recipe=name)  # checks notebooks, order, and where outputs go
    assert set(table(run).values()) == {"missing"}
    for step in steps(run):
        pipeline.check_parameters(step)


def test_a_stage_comes_after_the_one_it_goes_on_from(run):
    assert by_name(run)["02_train_full"].after == ("00_image_lists", "02_train_c2x")
    assert by_name(run)["02_train_clean"].after == ("00_image_lists",)


def test_folders_of_recipes_with_a_slash_lie_under_work(run):
    work = run.work
    assert run.folder == work / "pipeline-glr2021-seresnet101_ibn_a"
    assert run.runs == work / "runs" / "glr2021" / "seresnet101_ibn_a"
    assert run.features == work / "features" / "glr2021" / "seresnet101_ibn_a"
    assert run.submission.parent == work / "answers" / "glr2021" / "seresnet101_ibn_a"


def test_the_machine_is_in_no_fingerprint(run):
    machine = {"num_gpus": 8, "workers": 6, "save_every": 7}
    machine["machine"] = {"accumulate": 2, "channels_last": False}
    step = by_name(replace(run, **machine))["02_train_c2x"]
    assert step.machine == machine
    assert {s.name: s.parameters for s in steps(run)} == {
        s.name: s.parameters for s in steps(replace(run, **machine))
    }


@pytest.mark.parametrize(
    ("field", "value"), [("num_gpus", 0), ("workers", -1), ("save_every", 0)]
)
def test_a_number_that_is_too_small_is_refused(run, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, not at least"):
        replace(run, **{field: value})


def test_an_unknown_field_of_the_machine_is_refused_by_a_list(run):
    with pytest.raises(ValueError, match="machine: 'lr' is not one of accumulate, "):
        replace(run, machine={"lr": 1})


# What is trained on


def test_offline_numbers_come_from_models_that_saw_no_validation_image(run):
    chain = by_name(run)
    assert chain["02_train_all"].parameters["overrides"] == {"images": "all_holdout"}
    assert chain["02_train_full"].parameters["overrides"] == {}
    assert chain["00_image_lists"].parameters["wanted"] == [
        *("clean", "c2x", "full", "all_holdout"),
        *("query", "index", "index_train_holdout", "solution"),
    ]
    voters = chain["03_features_trained"].parameters["images"][-1]
    assert voters == "index_train_holdout"


def test_index_train_is_trained_on_without_validation_too(run, monkeypatch):
    toy = recipes.get("toy")
    stages = (replace(toy.stages[0], images="index_train"), *toy.stages[1:])
    monkeypatch.setitem(recipes.RECIPES, "toy", replace(toy, stages=stages))
    stage, changes = replace(run, recipe="toy").stages["clean"]
    assert stage.images == changes["images"] == "index_train_holdout"


def test_other_changes_go_with_the_holdout(run):
    run = replace(
        run, overrides={"all": {"epochs": 1, "batch": 8}, "c2x": {"size": 64}}
    )
    chain = by_name(run)
    assert chain["02_train_all"].parameters["overrides"] == {
        "images": "all_holdout",
        "epochs": 1,
        "batch": 8,
    }
    assert chain["02_train_c2x"].parameters["overrides"] == {"size": 64}
    assert run.stages["all"][0].batch == 8


def test_training_on_everything_gives_no_offline_number(run):
    chain = by_name(replace(run, holdout=False))
    assert list(chain)[-2:] == ["02_train_all", "03_features_trained"]
    assert chain["02_train_all"].parameters["overrides"] == {}
    assert chain["00_image_lists"].parameters["wanted"] == [
        *("clean", "c2x", "full", "all", "query", "index", "index_train"),
    ]
    assert chain["03_features_trained"].parameters["images"] == [
        *("query", "index", "index_train"),
    ]


def test_a_list_with_validation_images_is_not_taken_by_hand(run):
    run = replace(run, overrides={"full": {"images": "all"}})
    with pytest.raises(ValueError, match="full: list all holds .* take all_holdout"):
        steps(run)
    assert steps(replace(run, holdout=False))
    honest = replace(run, overrides={"all": {"images": "full"}})
    assert honest.stages["all"][0].images == "full"


def test_a_smaller_index_is_searched_and_compared(run, tmp_path):
    run = replace(run, index_ids=str(tmp_path / "ids"))
    chain = by_name(run)
    assert chain["04_tune_rerank"].parameters["index"] == "index_val"
    assert "index_val" in chain["03_features_untrained"].parameters["images"]


def test_a_recipe_names_the_steps_that_are_tuned_unless_the_user_does(run):
    def tuned(run):
        return by_name(run)["04_tune_rerank"].parameters["steps"]

    assert tuned(run) == ["landmark_country"]
    assert tuned(replace(run, rerank=("dba", "refine"))) == ["dba", "refine"]
    assert tuned(replace(run, rerank=("small-places",))) == ["small-places"]
    assert tuned(replace(run, rerank=())) == []
    assert tuned(replace(run, recipe="glr2019/v19c")) == ["sort_insert"]
    with pytest.raises(ValueError, match="step 'debra' is not one of whitening, dba"):
        replace(run, rerank=("debra",))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_names_steps_that_there_are(name):
    assert set(recipes.get(name).rerank) <= set(STEPS)


def test_graphs_are_kept_of_the_index_and_the_references_where_asked(run):
    plain = by_name(run)["03_features_trained"]
    assert "graphs_of" not in plain.parameters
    chain = by_name(replace(run, neighbours=30))
    step = chain["03_features_trained"]
    assert step.parameters["graphs_of"] == ["index", "index_train_holdout"]
    assert step.parameters["neighbours"] == 30
    models, graphs = step.parameters["models"], Path(step.parameters["graphs"])
    assert {graphs / model / "index" for model in models} <= set(step.outputs)
    assert "graphs_of" not in chain["03_features_untrained"].parameters
    assert chain["04_tune_rerank"].parameters["graphs"] == str(graphs)
    assert chain["05_submission"].parameters["work"] == str(run.work)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"cleen": {"epochs": 1}}, "has no stage 'cleen'"),
        ({"clean": {"epoch": 1}}, "no field 'epoch'"),
        ({"clean": {"epochs": 0}}, "epochs is 0, not at least 1"),
    ],
)
def test_changes_that_do_not_fit_are_refused(run, overrides, words):
    with pytest.raises(ValueError, match=words):
        steps(replace(run, overrides=overrides))


# The command


@pytest.mark.parametrize(
    ("text", "value"),
    [("8.5h", 30600), ("30m", 1800), ("90s", 90), ("90", 90), ("0.5", 0.5)],
)
def test_a_time_has_a_unit_or_is_in_seconds(text, value):
    assert plan.seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "0h", "-5m", "8,5h", "8h30m", "1d", "h", "nan"]
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is no time to stop after; write 8.5h, 30m"):
        plan.seconds(text)


def command(run, *more):
    return [*COMMAND, "--data", str(run.data), "--work", str(run.work), *more]


def done(run, *more):
    return subprocess.run(
        command(run, *more), capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def script(run, monkeypatch):
    """run_pipeline.py's `main`, in this process; takes the options."""
    spec = importlib.util.spec_from_file_location("run_pipeline", COMMAND[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run.data.mkdir()

    def main(*more):
        monkeypatch.setattr(sys, "argv", command(run, *more)[1:])
        monkeypatch.setattr(os, "environ", os.environ.copy())
        module.main()

    return main


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stop-after", "soon"], "'soon' is no time to stop after"),
        (["--nodes", "2"], "2 nodes need rendezvous='host:port' of node 0, not ''"),
        (["--node-rank", "1"], "node_rank 1 is not one of 1 nodes"),
        (["--max-restarts", "-1"], "max_restarts is -1, not at least 0"),
        (["--recipe", "toi"], "close: toy"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    run, script, more, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        script(*more)
    assert not run.work.exists()


def test_the_help_lists_the_recipes_and_says_what_nodes_share(script, capsys):
    with pytest.raises(SystemExit):
        script("--help")
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in recipes.RECIPES)
    assert "Allneedthesame--workfolder" in said
    assert "steps04,05and07areleftout" in said


def test_the_list_of_steps_without_a_holdout_has_no_numbers(run, script, capsys):
    script("--recipe", "toy", "--everything", "--recognise", "--list")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[-1] == "03_features_trained"
    assert not run.work.exists()


@pytest.mark.slow
def test_a_command_that_is_stopped_says_so_and_is_no_failure(run):
    run.data.mkdir()
    ended = done(run, "--recipe", "toy", "--stop-after", "0.001")
    assert ended.returncode == 0, ended.stderr
    last = "stopped as asked before 00_image_lists; the same command goes on"
    assert ended.stdout.splitlines()[-1] == last


@pytest.mark.slow
def test_the_other_node_ends_with_the_pipeline_of_node_0(run, gldv2):
    """Two commands of one user, on one machine: node 0 fails on its data's first step."""
    run = replace(run, data=gldv2)
    (gldv2 / "train" / "train_clean.csv").unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    given = ["--recipe", "toy", "--nodes", "2", "--rendezvous", where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(command(run, *given, "--node-rank", rank), **pipes)
        for rank in ("1", "0")
    ]
    (_, joined), (_, led) = (process.communicate(timeout=200) for process in both)
    assert [process.returncode for process in both] == [1, 1]
    assert "train_clean.csv: no such file" in led
    assert joined.startswith(
        "run_pipeline: the pipeline of node 0 ended: 00_image_lists"
    )


@pytest.mark.slow
def test_two_nodes_do_every_step_and_one_has_nothing_left_to_do(tmp_path):
    data = toy.render(tmp_path / "data", toy.ToyConfig(landmarks=8, images=80, side=64))
    run = Run("toy", data, tmp_path / "work")
    tiny = [
        "--set",
        "clean.size=48",
        "--set",
        "clean.epochs=1",
        "--set",
        "clean.batch=8",
    ]
    tiny += ["--set", "c2x.size=64", "--set", "c2x.epochs=1", "--set", "c2x.batch=8"]
    tiny += ["--workers", "0", "--machine", "accumulate=2"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    given = [*tiny, "--nodes", "2", "--rendezvous", where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    both = [
        subprocess.Popen(
            command(run, *given, "--node-rank", rank), **pipes, env=environment
        )
        for rank in ("0", "1")
    ]
    (led, wrong), (joined, lost) = (each.communicate(timeout=500) for each in both)
    assert [process.returncode for process in both] == [0, 0], led + wrong + lost
    assert joined.count("joining kit.training.stage") == 2
    assert joined.count("joining kit.features.extract") == 2 + 3  # one a list
    score, protocol = led.splitlines()[-2:]
    assert score.startswith("private mAP@100 0.")
    assert protocol.startswith("ground truth retrieval_solution_v2.1.csv")
    assert files.read_json(run.runs / "c2x" / "job.json")["accumulate"] == 2
    alone = done(run, *tiny)
    assert alone.returncode == 0
    assert alone.stdout.count("done already") == 7
    assert files.read_json(run.folder / "nodes" / "session.json")["ended"] == "well"


# Recipes of one work folder


@pytest.fixture
def small(tmp_path):
    return toy.render(tmp_path / "data", toy.ToyConfig(landmarks=8, images=80, side=64))


def make_lists(run):
    pipeline.run(steps(run)[:1], run.folder)
    return {path.name: files.sha256(path) for path in run.lists.iterdir()}


def test_recipes_share_the_lists_of_the_same_data_and_options(run, small):
    first = make_lists(run)
    assert make_lists(replace(run, recipe="toy", weights=run.work / "w")) == first
    assert table(run)["00_image_lists"] == "done"


def test_lists_that_another_recipe_made_with_exclusions_are_refused(run, small):
    excluded = small.parent / "exclusions.csv"
    train = (small / "train" / "train.csv").read_text().splitlines()
    excluded.write_text(f"id,reason\n{train[1].split(',')[0]},seen\n")
    first = make_lists(replace(run, exclusions=str(excluded)))
    other = replace(run, recipe="toy")
    with pytest.raises(ValueError, match=r"pipeline-glr2021.* with other .*exclusions"):
        make_lists(other)
    assert make_lists(replace(other, exclusions=str(excluded))) == first
    excluded.write_text("id,reason\n")
    with pytest.raises(ValueError, match=f"with other {excluded};"):
        make_lists(replace(run, exclusions=str(excluded)))


def test_an_old_answer_is_there_while_lists_are_made_again(run, small, monkeypatch):
    make_lists(run)
    facts = sources.read(small, "gldv2", "")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda p, **k: (removed.append(p.name), unlink(p, **k))
    )
    lists.build(facts, small, run.lists, sizes=False)
    assert all(name.endswith(".part") for name in removed)


@pytest.mark.parametrize("place", ["lists/mine.csv", "lists", "runs/toy/clean/a.csv"])
@pytest.mark.parametrize("field", ["exclusions", "index_ids", "clean", "weights"])
def test_a_user_file_in_an_output_folder_is_refused_before_it_is_removed(
    run, field, place
):
    mine = run.work / place
    (mine if place == "lists" else mine.parent).mkdir(parents=True)
    if place != "lists":
        mine.write_text("id,reason\n")
    value = mine if field == "weights" else str(mine)
    given = replace(run, recipe="toy", **{field: value})
    with pytest.raises(ValueError, match=f"output .* holds {mine}"):
        pipeline.run(steps(given), given.folder, start="00_image_lists")
    assert mine.exists()


def test_a_work_folder_among_folders_of_classes_is_refused(run):
    for work in (run.data, run.data / "work"):
        with pytest.raises(ValueError, match=f"work: {work} lies in {run.data}"):
            replace(run, layout="folders", work=work)
