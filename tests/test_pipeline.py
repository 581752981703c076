import functools
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from kit import __version__, files, pipeline
from kit.launch import Stopped
from kit.pipeline import Status, Step, StepError

PARAMETERS = """\
out: str = ""  # the file this step writes
text: str = "x"  # what it writes
size: int = 384  # not used
"""
WRITE = "with open(out, 'a') as file:\n    file.write(text)"  # once more at each run


def write_notebook(path, *code, prose="# A title", tags=("parameters",)):
    cells = [nbformat.v4.new_markdown_cell(prose)]
    for tag in tags:
        cells.append(nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": [tag]}))
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path
    )
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "toy"


@pytest.fixture
def chain(tmp_path, folder):
    """Three steps that each append to a file: 1, 2 after 1, and 3 on its own."""
    folder.mkdir(parents=True)
    steps = []
    for number, after in enumerate([(), ("step1",), ()], start=1):
        notebook = write_notebook(tmp_path / f"{number}.ipynb", WRITE)
        out = folder.parent / f"{number}.txt"
        parameters = {"out": str(out), "text": str(number)}
        steps.append(Step(f"step{number}", notebook, parameters, after, (out,)))
    return steps


def written(steps):
    return [
        output.read_text() if output.exists() else ""
        for step in steps
        for output in step.outputs
    ]


def states(steps, folder):
    return [each.state for each in pipeline.status(steps, folder)]


# Doing, and not doing again


def test_steps_run_in_order_and_are_skipped_the_second_time(chain, folder, capsys):
    pipeline.run(chain, folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"step{number}: {what}"
        for number in (1, 2, 3)
        for what in (f"running {chain[number - 1].notebook}", "done")
    ]
    pipeline.run(chain, folder)
    assert capsys.readouterr().out.splitlines() == [
        "step1: done already",
        "step2: done already",
        "step3: done already",
    ]
    assert written(chain) == ["1", "2", "3"]
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        *(f"step{number}.ipynb" for number in (1, 2, 3)),
        *(f"step{number}.done.json" for number in (1, 2, 3)),
    }
    marker = files.read_json(folder / "step1.done.json")
    assert marker["parameters"] == chain[0].parameters
    assert marker["kit"] == __version__
    assert marker["finished"].endswith("+00:00")
    assert marker["seconds"] > 0
    assert marker["peak_bytes"] > 10e6


def test_an_edited_cell_or_parameter_reruns_the_step_and_those_that_read_it(
    chain, folder
):
    pipeline.run(chain, folder)
    chain[0] = replace(chain[0], parameters={**chain[0].parameters, "size": 512})
    assert states(chain, folder) == ["stale", "stale", "done"]
    pipeline.run(chain, folder)
    assert written(chain) == ["11", "22", "3"]

    write_notebook(chain[1].notebook, WRITE, "size += 1")
    assert states(chain, folder) == ["done", "stale", "done"]
    pipeline.run(chain, folder)
    assert written(chain) == ["11", "222", "3"]


def test_what_belongs_to_the_machine_is_passed_but_makes_nothing_stale(chain, folder):
    write_notebook(
        chain[0].notebook, "with open(out, 'a') as file: file.write(f'{size}')"
    )
    chain[0] = replace(chain[0], machine={"size": 8})
    pipeline.run(chain, folder)
    assert written(chain) == ["8", "2", "3"]
    assert files.read_json(folder / "step1.done.json")["machine"] == {"size": 8}
    chain[0] = replace(chain[0], machine={"size": 1})
    assert states(chain, folder) == ["done", "done", "done"]
    pipeline.run(chain, folder, force=["step1"])
    assert written(chain)[0] == "1"


def test_prose_outputs_and_cell_ids_do_not_matter(chain, folder):
    pipeline.run(chain[:1], folder)
    write_notebook(chain[0].notebook, WRITE, prose="# A better title")  # new ids too
    notebook = nbformat.read(chain[0].notebook, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="old")]
    nbformat.write(notebook, chain[0].notebook)
    assert states(chain[:1], folder) == ["done"]


def test_a_deleted_output_reruns_the_step(chain, folder):
    pipeline.run(chain[:2], folder)
    chain[0].outputs[0].unlink()
    assert states(chain[:2], folder) == ["stale", "done"]
    pipeline.run(chain[:2], folder)
    assert written(chain[:2]) == ["1", "2"]


def test_a_forced_step_starts_afresh_and_runs_alone(chain, folder):
    pipeline.run(chain[:2], folder)
    pipeline.run(chain[:2], folder, force=["step1"])
    assert written(chain[:2]) == ["1", "2"]  # not "11", not "22"
    assert states(chain[:2], folder) == ["done", "done"]


def test_start_forces_every_later_step_even_after_a_failure_on_the_way(chain, folder):
    pipeline.run(chain, folder)
    good = chain[1].notebook.read_bytes()
    write_notebook(chain[1].notebook, "1 / 0")
    with pytest.raises(StepError):
        pipeline.run(chain, folder, start="step2")
    assert states(chain, folder) == ["done", "failed", "missing"]
    chain[1].notebook.write_bytes(good)
    pipeline.run(chain, folder)
    assert written(chain) == ["1", "2", "3"]


def test_a_folder_of_outputs_is_removed_when_its_step_is_forced(chain, folder):
    store = folder.parent / "store"
    write_notebook(
        chain[0].notebook, "import os; os.makedirs(out)", "open(out + '/' + text, 'w')"
    )
    step = replace(
        chain[0], parameters={"out": str(store), "text": "a"}, outputs=(store,)
    )
    pipeline.run([step], folder)
    (store / "left over").touch()
    pipeline.run([step], folder, force={"step1"})
    assert [path.name for path in store.iterdir()] == ["a"]


# What the notebook gets


def test_braces_in_paths_are_braces_and_the_notebook_imports_this_kit(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    place = tmp_path / "a{text}b{}"
    place.mkdir()
    notebook = write_notebook(
        place / "see.ipynb",
        "import os, sys, kit\nprint(os.getcwd(), kit.__file__, text)",
        "print('to stderr', file=sys.stderr)\nassert '/somewhere' in sys.path",
    )
    text = 'a "quoted" \\ line\nand {braces}'
    pipeline.run([Step("see", notebook, {"text": text})], place / "work" / "toy")
    out, err = capsys.readouterr()  # live, as the notebook prints
    assert (
        f"{place} {pipeline.__file__.replace('pipeline.py', '__init__.py')} {text}"
        in out
    )
    assert "to stderr" in err
    assert (place / "work" / "toy" / "see.ipynb").exists()
    assert os.environ["PYTHONPATH"] == "/somewhere"


@pytest.mark.parametrize("variable", ["JUPYTER_PATH", "JUPYTER_DATA_DIR"])
def test_a_notebook_runs_in_this_interpreter_whatever_is_called_python3(
    chain, folder, monkeypatch, tmp_path, variable
):
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    files.write_json(
        tmp_path / "kernels" / "python3" / "kernel.json",
        {"argv": ["/none/python"], "display_name": "Python 3", "language": "python"},
    )
    monkeypatch.setenv(variable, str(tmp_path))
    write_notebook(chain[0].notebook, "import sys; text = sys.executable", WRITE)
    pipeline.run(chain[:1], folder)
    assert written(chain)[0] == sys.executable


def test_relative_paths_are_the_callers(chain, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    step = replace(chain[0], notebook=Path("../1.ipynb"), outputs=(Path("1.txt"),))
    pipeline.run([step], Path("toy"))
    assert states([step], folder) == ["done"]


# Refused before anything runs


def refusal(steps, folder, **wanted):
    with pytest.raises(ValueError) as error:
        pipeline.run(steps, folder, **wanted)
    assert not list(folder.glob("*")), "something ran"
    return str(error.value)


def test_an_unknown_parameter_is_refused_with_the_known_ones(chain, folder):
    chain[2] = replace(chain[2], parameters={"sise": 512})
    assert refusal(chain, folder) == (
        "step3: unknown parameter 'sise', did you mean 'size'? "
        "3.ipynb knows out, text, size"
    )


def test_parameters_of_the_machine_are_checked_like_the_others(chain, folder):
    chain[2] = replace(chain[2], machine={"sise": 512})
    assert "unknown parameter 'sise', did you mean 'size'?" in refusal(chain, folder)
    chain[2] = replace(chain[2], machine={"text": "3"})
    assert refusal(chain, folder) == "step3: parameter text stands in machine, too"


@pytest.mark.parametrize("value", [Path("a"), (1, 2), {1: 2}, float("nan"), [{3}]])
def test_a_parameter_that_papermill_would_bend_is_refused(chain, folder, value):
    chain[0] = replace(chain[0], parameters={"text": value})
    assert "step1: parameter text = " in refusal(chain, folder)


@pytest.mark.parametrize("tags", [(), ("parameters", "parameters")])
def test_a_notebook_has_one_parameter_cell(chain, folder, tags):
    write_notebook(chain[1].notebook, WRITE, tags=tags)
    text = refusal(chain, folder)
    assert text.startswith("step2: ") and text.endswith(f"it has {len(tags)}")


def test_what_is_no_notebook_is_refused_by_name(chain, folder):
    chain[1].notebook.write_text("not a notebook")
    assert refusal(chain, folder).startswith(f"step2: {chain[1].notebook}: ")
    chain[1].notebook.unlink()
    assert refusal(chain, folder).startswith("step2: there is no notebook")


def test_names_are_unique_and_only_earlier_steps_can_be_read(chain, folder):
    first, second, third = chain
    assert "two steps" in refusal([first, first], folder)
    assert "(earlier: step3)" in refusal([third, second, first], folder)
    assert "'nothing'" in refusal([replace(first, after=("nothing",))], folder)
    assert "letters" in refusal([replace(first, name="a/../../b")], folder)


@pytest.mark.parametrize("wanted", [{"force": ["step9"]}, {"start": "step9"}])
def test_unknown_steps_cannot_be_forced(chain, folder, wanted):
    text = refusal(chain, folder, **wanted)
    assert text == "no step 'step9'; the steps are step1, step2, step3"


def test_outputs_lie_under_the_work_root_and_hold_nothing_else(chain, folder):
    root, precious = folder.parent, folder.parent.parent / "precious"
    precious.mkdir()
    (root / "link").symlink_to(precious)
    for path in (precious, root, root / ".." / "precious", root / "link", Path("/")):
        step = replace(chain[0], outputs=(path,))
        assert "is not under" in refusal([step], folder, force=["step1"])
    step = replace(chain[0], outputs=(folder,))
    assert f"holds {folder}" in refusal([step], folder, force=["step1"])
    step = replace(chain[0], outputs=(root / "notebooks",))
    (root / "notebooks").mkdir()
    step = replace(step, notebook=write_notebook(root / "notebooks" / "1.ipynb", WRITE))
    assert "1.ipynb" in refusal([step], folder, force=["step1"])
    assert precious.exists() and step.notebook.exists()


@pytest.mark.parametrize("kind", ["inputs", "user_files"])
@pytest.mark.parametrize("place", ["inside", "equal", "above", "link"])
def test_what_a_user_gave_is_in_no_output_that_a_forced_step_removes(
    chain, folder, kind, place
):
    root = folder.parent
    (root / "store/deep").mkdir(parents=True)
    mine = root / "store/deep/mine.csv"
    mine.write_text("mine")
    (root / "link.csv").symlink_to(mine)
    output = {"equal": mine, "above": root / "store/deep"}.get(place, root / "store")
    given = root / "link.csv" if place == "link" else mine
    if place == "above":  # a folder that was given, and an output around it
        given, output = root / "store/deep", root / "store"
    steps = [chain[0], replace(chain[1], outputs=(output,))]
    steps[0] = replace(steps[0], **{kind: (given,)})
    text = refusal(steps, folder, start="step1")
    assert text == f"step2: output {output} holds {given}; move that elsewhere"
    assert mine.read_text() == "mine"


# Chains of one work folder


@pytest.fixture
def beside(chain, folder):
    """A chain of one step by its name; all write the same file, which an option decides."""
    write_notebook(chain[0].notebook, "open(out, 'w').write(text)")

    def chain_of(name, decided, text="1"):
        parameters = chain[0].parameters | {"text": text}
        step = replace(chain[0], parameters=parameters, shared={"option": decided})
        return [step], folder.parent / name

    return chain_of


def test_chains_share_an_output_that_the_same_options_decide(beside):
    pipeline.run(*beside("a", "x"))
    pipeline.run(*beside("b", "x"))
    assert states(*beside("a", "x")) == states(*beside("b", "x")) == ["done"]


def test_a_chain_alone_may_change_what_decides_an_output(beside, chain):
    pipeline.run(*beside("a", "x"))
    pipeline.run(*beside("a", "y", "2"))
    assert written(chain)[0] == "2"


@pytest.mark.parametrize("changed", ["option", "input"])
def test_a_shared_output_with_other_options_is_refused_by_name(
    beside, chain, tmp_path, changed
):
    table = tmp_path / "table.csv"
    table.write_text("a")
    chain[0] = replace(chain[0], inputs=(table,))
    pipeline.run(*beside("a", "x"))
    if changed == "input":
        table.write_text("b")
    named = {"option": "option", "input": str(table)}[changed]
    with pytest.raises(ValueError, match=f"step1: a made .*1.txt with other {named};"):
        pipeline.run(*beside("b", "y" if changed == "option" else "x"))
    assert written(chain)[0] == "1"


def test_a_forced_step_takes_a_shared_output_from_the_other_chain(beside, monkeypatch):
    pipeline.run(*beside("a", "x"))
    with files.lock(beside("a", "x")[1]), pytest.raises(RuntimeError, match="/a: "):
        pipeline.run(*beside("b", "y"), start="step1")  # while the other one runs
    assert states(*beside("a", "x")) == ["done"]
    pipeline.run(*beside("b", "y"), start="step1")
    assert states(*beside("a", "x")) == ["missing"]
    with pytest.raises(ValueError, match="step1: b made"):
        pipeline.run(*beside("a", "x"))


def test_a_shared_output_stays_until_a_forced_step_has_written_it_again(beside, chain):
    pipeline.run(*beside("a", "x"))
    write_notebook(chain[0].notebook, "assert open(out).read() == text", WRITE)
    pipeline.run(*beside("a", "x"), force=["step1"])
    assert written(chain)[0] == "11"


def test_two_chains_that_start_at_once_do_not_share_other_options(beside, chain):
    write_notebook(chain[0].notebook, "import time; time.sleep(2)", WRITE)
    program = """
        import sys
        from pathlib import Path
        from kit.pipeline import Step, run
        notebook, out, name, decided = sys.argv[1:]
        step = Step("step1", Path(notebook), {"out": out}, (), (Path(out),), shared={"option": decided})
        run([step], Path(out).parent / name)
    """
    (out,) = chain[0].outputs
    command = [sys.executable, "-c", textwrap.dedent(program), chain[0].notebook, out]
    root = Path(pipeline.__file__).parents[1]
    running = [
        subprocess.Popen([*command, name, name], cwd=root, stderr=subprocess.PIPE)
        for name in "ab"
    ]
    said = [each.communicate()[1].decode() for each in running]
    assert sorted(each.returncode for each in running) == [0, 1], said
    assert "with other option;" in "".join(said)
    assert written(chain)[0] == "x"


def test_one_run_at_a_time_in_a_folder(chain, folder, monkeypatch):
    monkeypatch.setattr(files, "lock", functools.partial(files.lock, patience=0.1))
    with files.lock(folder), pytest.raises(RuntimeError, match="another process"):
        pipeline.run(chain, folder)
    assert written(chain) == ["", "", ""]


# Failing


def test_a_failing_cell_is_one_line_and_the_next_run_goes_on_from_there(chain, folder):
    write_notebook(
        chain[1].notebook, "raise ValueError('no such\\n  recipe')", "text = 'never'"
    )
    with pytest.raises(StepError) as error:
        pipeline.run(chain, folder)
    kept = folder / "step2.error.ipynb"
    assert str(error.value) == f"step2: ValueError: no such recipe (see {kept})"
    assert "no such" in kept.read_text()
    assert states(chain, folder) == ["done", "failed", "missing"]
    assert not list(folder.glob("*.running.ipynb"))

    write_notebook(chain[1].notebook, WRITE)
    pipeline.run(chain, folder)
    assert written(chain) == ["1", "2", "3"]
    assert states(chain, folder) == ["done"] * 3
    assert not kept.exists()


def test_a_notebook_that_stops_ends_the_chain_and_the_next_run_goes_on(chain, folder):
    stop = "from kit.launch import Stopped; raise Stopped('saved')"
    write_notebook(chain[1].notebook, stop)
    with pytest.raises(Stopped) as stopped:
        pipeline.run(chain, folder)
    said = "stopped as asked at step2; the same command goes on"
    assert str(stopped.value) == said
    assert states(chain, folder) == ["done", "stopped", "missing"]
    assert not list(folder.glob("*.error.ipynb"))
    assert "saved" in (folder / "step2.stopped.ipynb").read_text()
    write_notebook(chain[1].notebook, WRITE)
    pipeline.run(chain, folder)
    assert written(chain) == ["1", "2", "3"]
    assert not list(folder.glob("*.stopped.ipynb"))


def test_no_step_starts_when_the_time_is_over(chain, folder, monkeypatch):
    pipeline.run(chain[:1], folder)
    monkeypatch.setenv("KIT_STOP_AT", str(time.time()))
    with pytest.raises(Stopped, match="^stopped as asked before step2; the same"):
        pipeline.run(chain, folder)
    assert states(chain, folder) == ["done", "missing", "missing"]
    pipeline.run(chain[:1], folder)  # what is done needs no time
    monkeypatch.setenv("KIT_STOP_AT", str(time.time() + 100))
    pipeline.run(chain, folder)
    assert written(chain) == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_of_a_notebook_that_stop_end_the_chain(
    chain, folder, processes, monkeypatch
):
    module = """
        import sys
        from kit.launch import Stopped, entry, group

        @entry
        def main(arguments=None):
            with group():
                raise Stopped("saved")

        if __name__ == "__main__":
            main()
    """
    (folder.parent / "worker.py").write_text(textwrap.dedent(module))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    logs = f"logs=Path({str(folder)!r}) / 'logs'"
    write_notebook(
        chain[1].notebook,
        "from pathlib import Path\nfrom kit.launch import launch",
        f"launch('worker', [], processes={processes}, {logs})",
    )
    with pytest.raises(Stopped, match="^stopped as asked at step2"):
        pipeline.run(chain, folder)


def test_a_killed_kernel_is_reported_as_such(chain, folder):
    write_notebook(
        chain[0].notebook, WRITE, "import os; os.kill(os.getpid(), 9)", WRITE
    )
    with pytest.raises(StepError) as error:
        pipeline.run(chain, folder)
    kept = folder / "step1.error.ipynb"
    assert str(error.value) == (
        "step1: the kernel was killed (out of memory?); fewer --workers need less "
        f"(see {kept})"
    )
    assert states(chain, folder) == ["failed", "missing", "missing"]
    assert written(chain) == ["1", "", ""]


def test_a_missing_output_is_an_error(chain, folder):
    write_notebook(chain[0].notebook, "pass")
    with pytest.raises(StepError, match="step1: ended without writing .*1.txt"):
        pipeline.run(chain, folder)
    assert states(chain, folder) == ["failed", "missing", "missing"]


def test_a_notebook_that_leaves_early_is_done_only_with_its_outputs(chain, folder):
    write_notebook(chain[0].notebook, "import sys; sys.exit(0)", WRITE)
    with pytest.raises(StepError, match="step1: ended without writing"):
        pipeline.run(chain, folder)
    write_notebook(chain[0].notebook, WRITE, "import sys; sys.exit(0)", "1 / 0")
    pipeline.run(chain[:1], folder)
    assert states(chain[:1], folder) == ["done"]
    write_notebook(chain[0].notebook, WRITE, "import sys; sys.exit(3)")
    with pytest.raises(StepError, match="step1: SystemExit: 3"):
        pipeline.run(chain[:1], folder)


def test_an_interrupt_passes_through_and_takes_the_kernel_along(chain, folder):
    pid = folder.parent / "pid"
    write_notebook(
        chain[0].notebook,
        "import os, signal, time",
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))",
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)",
    )
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(chain, folder)
    assert not Path(f"/proc/{pid.read_text()}").exists()
    assert states(chain, folder) == ["failed", "missing", "missing"]


@pytest.mark.slow
def test_after_a_killed_run_nothing_is_left_and_the_next_one_finishes(chain, folder):
    pid = folder.parent / "pid"
    write_notebook(
        chain[1].notebook,
        "import os, pathlib, time",
        f"pid = pathlib.Path({str(pid)!r})\nfirst = not pid.exists()\n"
        "pid.write_text(str(os.getpid()))\ntime.sleep(600 if first else 0)",
        WRITE,
    )
    steps = [[s.name, str(s.notebook), s.parameters, s.after] for s in chain]
    program = f"""
        import json, sys
        from pathlib import Path
        from kit import pipeline
        steps = json.loads({json.dumps(json.dumps(steps))})
        steps = [pipeline.Step(n, Path(p), w, tuple(a)) for n, p, w, a in steps]
        pipeline.run(steps, Path({str(folder)!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    root = Path(pipeline.__file__).parents[1]
    with subprocess.Popen(command, cwd=root) as runner:
        try:
            wait_for(lambda: pid.exists() and pid.read_text(), 60)
        finally:
            runner.kill()  # SIGKILL
    kernel = Path(f"/proc/{pid.read_text()}")
    wait_for(lambda: not kernel.exists() or "Z" in state(kernel), 15)
    steps = [replace(step, outputs=()) for step in chain]
    assert states(steps, folder) == ["done", "started", "missing"]
    pipeline.run(steps, folder)
    assert written(chain) == ["1", "2", "3"]
    assert states(steps, folder) == ["done"] * 3
    assert not list(folder.glob("*.running.ipynb"))


def wait_for(condition, seconds):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.1)


def state(process):
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"  # gone meanwhile


# Reporting


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_that_of_children_and_their_children():
    mine = b"1" * 100_000_000  # this process does not count
    program = "import sys; x = b'1' * 200_000_000; sys.stdin.read()"
    command = [sys.executable, "-c", program]
    parent = f"import subprocess; subprocess.run({command})"
    command = [sys.executable, "-c", parent]
    with (
        pipeline.peak_memory() as peak,
        subprocess.Popen(command, stdin=subprocess.PIPE),
    ):
        wait_for(lambda: (peak.bytes or 0) > 200e6, 30)
    assert 200e6 < peak.bytes < 280e6
    del mine


def test_peak_memory_without_children_is_unknown():
    # in a process of its own: other tests may have left this one a helper of multiprocessing
    code = (
        "import time\nfrom kit import pipeline\n"
        "with pipeline.peak_memory(interval=0.01) as peak:\n    time.sleep(0.05)\n"
        "assert peak.bytes is None, peak.bytes"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        check=True,
    )


def test_the_table_is_aligned():
    statuses = [
        Status("01_lists", "done", 3.25, 180_400_000),
        Status("02_train_clean", "missing"),
    ]
    assert pipeline.table(statuses) == textwrap.dedent("""\
        step            state    seconds  peak MB
        01_lists        done         3.2      180
        02_train_clean  missing        -        -""")


def test_a_run_sweeps_the_work_folder_of_what_killed_runs_left(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [tmp_path / place for place in ("lists", "runs/toy/clean/resume")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / f".a.{files._machine()}-{ended.pid}-5.part").write_text("half")
        (folder / "a").write_text("whole")
    pipeline.run([], tmp_path / "pipeline-toy")
    assert [[path.name for path in folder.iterdir()] for folder in left] == [["a"]] * 2
