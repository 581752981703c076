"""Every `python -m kit...` and every script: --help, no arguments, wrong ones."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MODULES = sorted((ROOT / "kit").rglob("*.py"))
COMMANDS = [
    path
    for path in (*MODULES, *SCRIPTS)
    if "\nif __name__ ==" in path.read_text(encoding="utf-8")
]
JOBS = ["kit.features.extract", "kit.features.graph", "kit.training.stage"]
WITHOUT = ["runtime.py"]  # nothing to ask for

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


def run(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The status that a command exits with: 0, a number, or the line that it prints."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    with pytest.raises(SystemExit) as ended:
        if path in SCRIPTS:
            runpy.run_path(str(path), run_name="__main__")
        else:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            runpy.run_module(name, run_name="__main__")
    return ended.value.code or 0


def test_every_kind_of_command_is_found():
    names = {path.relative_to(ROOT).as_posix() for path in COMMANDS}
    assert {"kit/features/graph.py", "scripts/run_pipeline.py"} <= names
    assert "kit/answers/metrics/__main__.py" in names


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_is_text_and_success(path, monkeypatch, capsys):
    assert run(path, "--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: ") and len(said.out.splitlines()) > 3
    assert "Traceback" not in said.err


@pytest.mark.parametrize("arguments", [[], ["--nonsense"]], ids=["none", "strange"])
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_wrong_arguments_are_one_line(path, arguments, monkeypatch, capsys):
    if not arguments and path.name in WITHOUT:
        pytest.skip("it takes none")
    assert run(path, *arguments, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert ": error: " in said.err.splitlines()[-1] and said.out == ""


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"nonsense": 1}', "{}"],
    ids=["absent", "empty", "half", "list", "strange", "lacking"],
)  # fmt: skip
@pytest.mark.parametrize("name", JOBS)
def test_a_wrong_job_is_one_line_that_names_the_file(
    name, text, monkeypatch, tmp_path, capsys
):
    job = tmp_path / "job.json"
    if text is not None:
        job.write_text(text)
    path = ROOT / Path(*name.split(".")).with_suffix(".py")
    line = run(path, str(job), monkeypatch=monkeypatch)
    assert isinstance(line, str) and str(job) in line and "\n" not in line
