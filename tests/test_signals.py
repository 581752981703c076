"""A signal to any process of a pipeline while two ranks work: everything ends, and soon.

KIT_TEST_ROUNDS=20 sends each signal to each kind of process so many times, at other moments.
"""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import nbformat
import pytest

from kit import pipeline

ROOT = Path(pipeline.__file__).parents[1]
ROUNDS = int(os.environ.get("KIT_TEST_ROUNDS", "1"))
GONE = 20.0  # seconds

WORKER = """
    import os, sys, time
    from pathlib import Path
    from kit.launch import Stopped, entry, time_left

    @entry
    def main(arguments=None):
        folder, rank = Path(arguments[0]), os.environ.get("RANK", "0")
        (folder / f"ready{rank}").touch()
        while not (folder / "go").exists():
            if time_left() <= 0:
                raise Stopped("saved")
            time.sleep(0.05)
        (folder / f"out{rank}").write_text(rank)

    if __name__ == "__main__":
        main(sys.argv[1:])
"""
PROGRAM = """
    import sys
    from pathlib import Path
    from kit import launch, pipeline
    folder = Path(sys.argv[1])
    outputs = (folder / "out0", folder / "out1")
    step = pipeline.Step("step", folder / "step.ipynb", outputs=outputs)
    try:
        with launch.interruptible():
            pipeline.run([step], folder / "steps")
    except launch.Interrupted as by:
        launch.die_by(by.number)
    except launch.Stopped as stopped:
        print(stopped)
    except RuntimeError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def work(tmp_path):
    """A work folder with a notebook that launches two ranks, which wait for the file `go`."""
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    code = (
        "from pathlib import Path\nfrom kit.launch import launch\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "launch('worker', [str(folder)], processes=2, logs=folder / 'logs')"
    )
    tag = {"tags": ["parameters"]}
    cells = [nbformat.v4.new_code_cell("size: int = 1  # not used", metadata=tag)]
    cells.append(nbformat.v4.new_code_cell(code))
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    nbformat.write(book, tmp_path / "step.ipynb")
    return tmp_path


def start(work, mark, background=False, **more):
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a shell's job with &
    paths = os.pathsep.join([str(ROOT), str(work)])
    known = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "KIT_TEST_MARK": mark}
    return subprocess.Popen(
        [*ignoring * background, sys.executable, str(work / "program.py"), str(work)],
        env=os.environ | known | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # these tests may themselves have been started by nohup
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
    )


def started_with(mark):
    """Processes that inherited `mark`, by id, and the words of their command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def wait_for(condition, seconds):
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True


TARGETS = {
    "pipeline": "program.py",
    "kernel": "ipykernel_launcher",
    "launcher": "kit.nodes.agent",
    "rank": "-u\0-m\0worker",
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_signal_ends_all_processes_and_the_next_run_finishes(work, name, target):
    number, rng = getattr(signal, name), random.Random(f"{name} {target}")
    for round_ in range(ROUNDS):
        mark = f"mark-{uuid.uuid4().hex}"
        background = (round_ + number) % 2 == 0
        for rank in "01":
            (work / f"ready{rank}").unlink(missing_ok=True)
        process = start(work, mark, background)
        assert wait_for(lambda: all((work / f"ready{r}").exists() for r in "01"), 120)
        time.sleep(rng.uniform(0, 1))
        aimed = [p for p, c in started_with(mark).items() if TARGETS[target] in c]
        sent = time.monotonic()
        os.kill(aimed[0], number)
        said = process.communicate(timeout=60)[0]
        gone = wait_for(lambda m=mark: not started_with(m), GONE)
        took = time.monotonic() - sent
        print(f"{name} {target} {background=}: gone {took:.1f} s, {process.returncode}")
        assert gone and took < GONE, started_with(mark)
        assert process.returncode == (-number if target == "pipeline" else 1), said
    (work / "go").touch()
    process = start(work, "after")
    assert process.communicate(timeout=120) and process.returncode == 0
    assert [(work / f"out{rank}").read_text() for rank in "01"] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.5, 3.0, 8.0])
def test_a_limit_is_a_stop_whenever_it_comes(work, limit):
    at = str(time.time() + limit)
    said = start(work, "stop", KIT_STOP_AT=at).communicate(timeout=120)[0]
    assert said.splitlines()[-1].startswith("stopped as asked")
