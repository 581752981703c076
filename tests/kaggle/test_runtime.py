import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.kaggle import runtime
from kit.kaggle.runtime import Gpu, Gpus, Mode

KINDS = {  # kind: name in the metadata, its place in both layouts
    "dataset": ("alice/kit-wheel", "kit-wheel", "datasets/alice/kit-wheel"),
    "competition": (
        "landmark-retrieval-2021",
        "landmark-retrieval-2021",
        "competitions/landmark-retrieval-2021",
    ),
    "notebook": ("alice/features", "features", "notebooks/alice/features"),
    "model": (
        "alice/glr/PyTorch/seresnet101/3",
        "glr/pytorch/seresnet101/3",
        "models/alice/glr/pytorch/seresnet101/3",
    ),
}
BATCH = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
AGAIN = BATCH | {"KAGGLE_IS_COMPETITION_RERUN": "1"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path))
    return tmp_path


def mount(root, place, text="x"):
    folder = root / "input" / place
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text(text)
    return folder


# Folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [1, 2])
def test_a_source_is_found_in_either_layout(root, kind, layout):
    folder = mount(root, KINDS[kind][layout])
    assert runtime.find(kind, KINDS[kind][0]) == folder


def test_sources_of_one_run_may_be_mounted_in_different_layouts(root):
    for number, (name, *places) in enumerate(KINDS.values()):
        folder = mount(root, places[number % 2])
        assert runtime.find(list(KINDS)[number], name) == folder


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_folders_the_one_that_names_its_owner_counts(root, kind, caplog):
    name, short, long = KINDS[kind]
    mount(root, short, "of somebody else")
    folder = mount(root, long)
    with caplog.at_level(logging.WARNING):
        assert runtime.find(kind, name) == folder
    (record,) = caplog.records
    assert f"{root}/input/{short}" in record.getMessage()


def test_two_names_of_one_folder_are_no_reason_to_warn(root, caplog):
    folder = mount(root, "datasets/alice/kit-wheel")
    (root / "input" / "kit-wheel").symlink_to(folder)
    assert runtime.find("dataset", "alice/kit-wheel") == folder
    assert not caplog.records


def test_an_empty_folder_does_not_hide_a_full_one(root):
    (root / "input" / "datasets" / "alice" / "kit-wheel").mkdir(parents=True)
    folder = mount(root, "kit-wheel")
    assert runtime.find("dataset", "alice/kit-wheel") == folder


def test_another_owners_dataset_is_not_taken(root):
    mount(root, "datasets/bob/kit-wheel")
    with pytest.raises(FileNotFoundError, match="datasets/bob/kit-wheel"):
        runtime.find("dataset", "alice/kit-wheel")


def test_another_version_of_a_model_is_not_taken(root):
    mount(root, "models/alice/glr/pytorch/seresnet101/2")
    with pytest.raises(FileNotFoundError, match="seresnet101/2"):
        runtime.find("model", KINDS["model"][0])


def test_a_pinned_version_of_a_dataset_is_not_in_its_path(root):
    folder = mount(root, "datasets/alice/kit-wheel")
    assert runtime.find("dataset", "alice/kit-wheel/7") == folder


@pytest.mark.parametrize("slug", ["datasets", "competitions", "notebooks", "models"])
def test_a_folder_of_a_kind_is_not_taken_for_a_source_of_that_name(root, slug):
    mount(root, f"{slug}/alice/other/x/y/z")
    with pytest.raises(FileNotFoundError):
        runtime.find("dataset", f"bob/{slug}")


def test_a_miss_lists_in_one_line_what_is_mounted(root):
    for _, short, long in KINDS.values():
        mount(root, long)
        mount(root, f"{short.split('/')[0]}-old")
    with pytest.raises(FileNotFoundError) as error:
        runtime.find("dataset", "alice/weights")
    said = str(error.value)
    assert said.startswith("dataset alice/weights: is not mounted; mounted: ")
    assert said.partition("; mounted: ")[2].split(", ") == runtime.mounted()
    assert "\n" not in said
    assert sorted(runtime.mounted()) == sorted(
        [long for _, _, long in KINDS.values()]
        + [f"{short.split('/')[0]}-old" for _, short, _ in KINDS.values()]
    )


def test_a_miss_says_that_a_mount_is_empty(root):
    (root / "input" / "kit-wheel").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="kit-wheel is mounted, but empty"):
        runtime.find("dataset", "alice/kit-wheel")


def test_where_nothing_is_mounted_the_error_names_the_folder_and_the_variable(root):
    with pytest.raises(FileNotFoundError, match=f"nothing in {root}/input.*KIT_KAGGLE"):
        runtime.find("dataset", "alice/kit-wheel")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("dataset", "kit-wheel"),
        ("dataset", "alice/../kit"),
        ("dataset", "alice/"),
        ("competition", "alice/landmark"),
        ("model", "alice/glr/pytorch/seresnet101"),
    ],
)
def test_a_name_of_another_form_is_refused_with_the_form(kind, name):
    with pytest.raises(ValueError, match=f"{kind} .* is not of the form .*slug|model/"):
        runtime.find(kind, name)


def test_an_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="dataset, competition, notebook, model"):
        runtime.find("datasets", "alice/kit-wheel")


def test_the_root_is_kaggles_own_without_the_variable(monkeypatch):
    monkeypatch.delenv("KIT_KAGGLE_ROOT")
    assert runtime.root() == Path("/kaggle")


def test_working_and_temp_are_made_under_the_root(root):
    assert runtime.working() == root / "working" and runtime.working().is_dir()
    assert runtime.temp() == root / "temp" and runtime.temp().is_dir()


def test_where_temp_cannot_be_made_the_systems_own_serves(root, monkeypatch, tmp_path):
    (root / "temp").write_text("a file in its place")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert runtime.temp() == tmp_path / "tmp" / "kaggle" and runtime.temp().is_dir()


# The run


@pytest.mark.parametrize(
    "environment, mode",
    [
        ({}, Mode.INTERACTIVE),
        ({"KAGGLE_KERNEL_RUN_TYPE": ""}, Mode.INTERACTIVE),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, Mode.INTERACTIVE),
        (BATCH, Mode.COMMIT),
        (BATCH | {"KAGGLE_IS_COMPETITION_RERUN": ""}, Mode.COMMIT),
        (AGAIN, Mode.RERUN),
        ({"KAGGLE_IS_COMPETITION_RERUN": "True"}, Mode.RERUN),
    ],
)
def test_the_environment_tells_the_mode(environment, mode):
    assert runtime.mode_by_environment(environment) is mode


def test_the_environment_is_this_process_own_when_none_is_given(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert runtime.mode_by_environment() is Mode.RERUN
    assert runtime.detect(["a"], ["b"]).agreed


def test_queries_are_hidden_when_they_are_others_than_the_public_ones():
    public = [f"{n:016x}" for n in range(1129)]
    other = public[:-1] + ["f" * 16]
    assert not runtime.hidden(public[::-1], public)
    assert runtime.hidden(other, public)  # as many, but not the same
    assert not runtime.hidden(public) and not runtime.hidden(other)  # 2021's count
    assert runtime.hidden(public + ["f" * 16]) and runtime.hidden(public[:-1])
    assert not runtime.hidden(["a", "b", "b"], 2)  # a query that stands there twice


@pytest.mark.parametrize(
    "environment, queries, mode, agreed",
    [
        ({}, "public", Mode.INTERACTIVE, True),
        ({}, "hidden", Mode.INTERACTIVE, False),
        (BATCH, "public", Mode.COMMIT, True),
        (BATCH, "hidden", Mode.RERUN, False),
        (AGAIN, "public", Mode.RERUN, False),
        (AGAIN, "hidden", Mode.RERUN, True),
    ],
)
def test_a_batch_run_in_doubt_does_all_the_work(environment, queries, mode, agreed):
    public = ["a", "b"]
    shown = {"public": ["b", "a"], "hidden": ["a", "c", "d"]}[queries]
    run = runtime.detect(shown, public, environment)
    assert run[:2] == (mode, agreed)
    assert run.statement.startswith(f"{mode}: ") and "\n" not in run.statement


def test_the_statement_names_what_disagrees():
    run = runtime.detect([str(n) for n in range(117_577)], environment=BATCH)
    assert run.statement == (
        "rerun: the environment says commit, but the 117,577 queries are not the 1,129 "
        "public ones; taken for rerun"
    )
    run = runtime.detect(["a"], 1, BATCH)
    assert run.statement == (
        "commit: so says the environment, and the 1 queries are the 1 public ones"
    )


def test_the_time_left_counts_from_the_start_and_keeps_the_reserve():
    assert runtime.stop_at(1000.0, 2, reserve=600) == 1000 + 7200 - 600
    assert runtime.time_left(1000.0, 2, now=1000.0) == 7200
    assert runtime.time_left(1000.0, 2, reserve=600, now=4000.0) == 3600
    assert runtime.time_left(1000.0, 2, now=9000.0) == -800
    for hours, reserve in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(ValueError, match="no time to work"):
            runtime.time_left(0.0, hours, reserve)


def test_the_clock_is_asked_where_no_time_is_given(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 4600.0)
    assert runtime.time_left(1000.0, 2) == 3600


# GPUs

T4 = Gpu(0, "Tesla T4", 15.8)
P100 = Gpu(1, "Tesla P100-PCIE-16GB", 17.1, "CUDA error: no kernel image is available")


def test_a_device_without_kernels_is_told_in_one_line():
    def dies():
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\n"
            "CUDA kernel errors might be asynchronously reported at some other API call\n"
        )

    assert runtime.fault(dies) == (
        "CUDA error: no kernel image is available for execution on the device"
    )
    assert runtime.fault(lambda: None) == ""


def test_an_error_of_the_program_is_not_taken_for_the_devices():
    with pytest.raises(ZeroDivisionError):
        runtime.fault(lambda: 1 / 0)


def test_a_gpu_with_a_fault_is_treated_as_none():
    assert Gpus((T4, P100)).working == (T4,)
    assert str(Gpus((T4, T4))) == "2 GPUs: Tesla T4 (16 GB), Tesla T4 (16 GB)"
    assert str(Gpus(())) == "no GPU"
    assert str(Gpus((P100,))) == (
        "no GPU; Tesla P100-PCIE-16GB is treated as none: "
        "CUDA error: no kernel image is available"
    )
    assert str(Gpus((), "the check took more than 300 s")).startswith("no GPU; the ch")


@pytest.mark.parametrize(
    "before, seen, after",
    [
        (None, Gpus((T4, P100)), "0"),
        ("3,5", Gpus((T4, P100)), "3"),
        (None, Gpus((P100,)), ""),
        (None, Gpus((), "trouble"), ""),
        (None, Gpus((T4, T4._replace(number=1))), None),
        ("3,5", Gpus((T4, T4._replace(number=1))), "3,5"),
        (None, Gpus(()), None),
    ],
)
def test_only_gpus_that_work_stay_visible(monkeypatch, before, seen, after):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runtime.hide_faulty(seen) == len(seen.working)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == after


def test_a_gpu_that_is_in_use_cannot_be_hidden_any_more(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="in use already"):
        runtime.hide_faulty(Gpus((P100,)))


def test_the_check_finds_what_torch_has_here_without_touching_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = (
        "import sys; from kit.kaggle import runtime; seen = runtime.gpus()\n"
        "assert 'torch' not in sys.modules\n"
        "print(seen)"
    )
    folder = Path(runtime.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("no GPU\n", "")


def _stands_for_python(tmp_path, monkeypatch, script):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_a_check_that_dies_is_told_and_no_gpu(tmp_path, monkeypatch):
    script = "echo first >&2; echo 'Segmentation fault' >&2; exit 139"
    _stands_for_python(tmp_path, monkeypatch, script)
    seen = runtime.gpus()
    assert str(seen) == "no GPU; the check ended with code 139: Segmentation fault"


def test_a_check_that_hangs_is_given_up(tmp_path, monkeypatch):
    _stands_for_python(tmp_path, monkeypatch, "exec sleep 60")
    assert str(runtime.gpus(patience=0.2)).startswith("no GPU; the check took more")


def test_what_the_check_prints_comes_back(tmp_path, monkeypatch):
    listed = json.dumps([T4, P100])
    _stands_for_python(tmp_path, monkeypatch, f"echo a warning; echo '{listed}'")
    assert runtime.gpus() == Gpus((T4, P100))


def test_on_a_gpu_the_operation_works_or_says_why():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    for gpu in runtime.gpus().found:
        assert not gpu.fault, gpu.fault
