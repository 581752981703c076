import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.kaggle import confine, sandbox
from kit.kaggle.sandbox import Limits

ROOT = Path(__file__).resolve().parents[2]
AMPLE = Limits(memory=2.0, disk=1.0, hours=0.01)
FORMS = ["namespaces", "plain"]


def confined(code, root, limits=AMPLE, **options):
    """The sandbox of a Python program."""
    (root / "input").mkdir(parents=True, exist_ok=True)
    return sandbox.confined([sys.executable, "-c", code], root, limits, **options)


@pytest.fixture(params=FORMS)
def isolated(request, tmp_path):
    """Both forms, where this machine allows them."""
    if request.param == "plain":
        return False
    try:
        with confined("", tmp_path / "trial", isolated=True):
            return True
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")


@pytest.fixture
def run(tmp_path, isolated):
    """Runs a program to its end: what came of it, what it printed, and its working files."""

    def run(code, limits=AMPLE, **options):
        with confined(code, tmp_path, limits, isolated=isolated, **options) as box:
            outcome = sandbox.watch(box)
            left = {path.name: path.read_bytes() for path in box.working.iterdir()}
        return outcome, (tmp_path / confine.LOG).read_text(), left

    return run


def gone(pid):
    """Whether a process has ended, at the latest in a few seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def alive(mark):
    """Processes of this machine whose command line holds a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_a_command_runs_in_working_with_its_own_code_and_output(run):
    code = "import os, sys; open('a', 'w').write(os.getcwd()); print('hi'); sys.exit(3)"
    outcome, said, left = run(code)
    assert outcome.code == 3 and not outcome.ended and not outcome.changed
    assert said == "hi\n"
    assert left["a"].decode().endswith("/working")


def test_only_what_tells_of_the_machine_passes(run, monkeypatch):
    for name in ("KAGGLE_KEY", "KAGGLE_KERNEL_RUN_TYPE", "HF_TOKEN", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    _, said, _ = run(code, variables={"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    seen = json.loads(said)
    assert "secret" not in seen.values()
    assert seen["KAGGLE_KERNEL_RUN_TYPE"] == "Batch" and seen["OMP_NUM_THREADS"] == "1"
    assert seen["HOME"] == seen["KIT_KAGGLE_ROOT"] + "/home"
    assert os.environ["HOME"] != seen["HOME"] and str(ROOT) not in seen.values()


WRITES = """
for path in {paths}:
    try:
        open(path, "a").write("x")
        print("written")
    except OSError as error:
        print(error.strerror)
"""


def test_input_cannot_be_changed_unseen(run, isolated, tmp_path):
    data = tmp_path / "elsewhere"
    data.mkdir()
    (data / "a.txt").write_text("content")
    (tmp_path / "input" / "set").mkdir(parents=True)
    (tmp_path / "input/set/a.txt").symlink_to(data / "a.txt")
    (tmp_path / "input/set/b.txt").write_text("content")
    wanted = [tmp_path / "input/set" / name for name in ("a.txt", "b.txt", "new.txt")]
    for path in wanted:
        outcome, said, _ = run(WRITES.format(paths=[str(path)]), sources=[data])
        if isolated:
            assert said == "Read-only file system\n" and not outcome.changed
        else:
            assert said == "written\n" and outcome.changed == f"set/{path.name}"
    assert (data / "a.txt").read_text() == ("content" if isolated else "contentx")


def test_a_small_file_with_its_old_size_and_time_is_a_changed_one(tmp_path):
    path = tmp_path / "input" / "a"
    path.parent.mkdir()
    path.write_text("one")
    code = f"import os; p = {str(path)!r}; t = os.stat(p).st_mtime_ns\n"
    code += "open(p, 'w').write('two'); os.utime(p, ns=(t, t))"
    with confined(code, tmp_path, isolated=False) as box:
        assert sandbox.watch(box).changed == "a"


CONNECTS = """
import socket, urllib.request
def tried(what):
    try:
        what()
        return "reached"
    except OSError as error:
        return type(error).__name__
here = socket.create_server(("127.0.0.1", 0))
print(tried(lambda: socket.create_connection(here.getsockname(), 5)))
print(tried(lambda: socket.create_connection(("localhost", here.getsockname()[1]), 5)))
far = ("192.0.2.1", 80)  # of no machine
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(tried(lambda: socket.socket().connect(far)))
print(socket.socket().connect_ex(far))
print(tried(lambda: udp.sendto(b"x", far)))
print(tried(lambda: urllib.request.urlopen("http://example.org", timeout=5)))
"""


def test_the_loopback_is_all_the_network_there_is(run):
    _, said, _ = run(CONNECTS)
    refused = ["reached", "reached", "OSError", "101", "OSError", "URLError"]
    assert said.split() == refused


def test_children_have_no_network_either(run):
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CONNECTS!r}])"
    )
    assert run(code)[1].split()[2:] == ["OSError", "101", "OSError", "URLError"]


def test_where_there_are_no_namespaces_names_are_not_even_looked_up(tmp_path):
    code = (
        "import socket\nfor host in ('localhost', '::1', '192.0.2.1', 'example.org'):\n"
    )
    code += "    try: print(bool(socket.getaddrinfo(host, 80)))\n"
    code += "    except socket.gaierror as error: print(error.errno)"
    with confined(code, tmp_path, isolated=False) as box:
        sandbox.watch(box)
    assert (tmp_path / confine.LOG).read_text().split() == ["True", "True", "-3", "-3"]


def test_a_process_cannot_have_more_memory_than_there_is(run):
    code = (
        "a = bytes(100_000_000); print('some', flush=True)\nb = bytearray(400_000_000)"
    )
    outcome, said, _ = run(code, Limits(memory=0.4))
    assert outcome.code == 1 and not outcome.ended
    assert said.startswith("some") and said.endswith("MemoryError\n")


def test_mapped_files_are_no_memory(run, tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1_000_000_000)
    code = "import mmap; file = open({!r}, 'rb')\n"
    code += "m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
    code += "print(sum(m[i] for i in range(0, len(m), 4096)))"
    outcome, said, _ = run(code.format(str(tmp_path / "large")), Limits(memory=0.4))
    assert said == "0\n" and outcome.code == 0


HOLDS = "b = b'x' * 150_000_000; import time; time.sleep(60)"


def test_processes_share_the_memory_there_is(run):
    code = "import subprocess, sys\n"
    code += f"for p in [subprocess.Popen([sys.executable, '-c', {HOLDS!r}])\n"
    code += "          for _ in range(3)]: p.wait()"
    outcome, _, _ = run(code, Limits(memory=0.4))
    assert "GB of memory, more than 0.4" in outcome.ended
    assert outcome.peak > 400_000_000


def test_a_page_that_processes_share_counts_once(run):
    code = "import os, time; b = b'x' * 150_000_000\n"
    code += "for _ in range(4): os.fork() or (time.sleep(1), os._exit(0))\n"
    code += "time.sleep(1.2); print('whole')"
    outcome, said, _ = run(code, Limits(memory=0.4))
    assert said == "whole\n" and not outcome.ended
    assert 150_000_000 < outcome.peak < 400_000_000


def test_a_file_system_is_full_at_its_limit(run, isolated):
    code = "open('a', 'wb').write(bytes(30_000_000)); print('in')"
    outcome, said, left = run(code, Limits(disk=0.02))
    assert outcome.code == 1 and len(left["a"]) <= 20_004_096  # whole pages
    assert ("No space left" if isolated else "File too large") in said


def test_many_small_files_fill_it_too(run, isolated):
    code = "import time\n"
    code += "for n in range(20): open(str(n), 'wb').write(bytes(2_000_000))\n"
    code += "time.sleep(60)"
    outcome, said, _ = run(code, Limits(disk=0.02))
    if isolated:
        assert "No space left" in said
    else:
        assert outcome.ended == "ended at 0.04 GB in working, more than 0.02"


def test_a_run_ends_at_its_hour(run):
    outcome, said, _ = run(
        "import time; print('on', flush=True); time.sleep(60)", Limits(hours=1 / 3600)
    )
    assert said == "on\n" and outcome.ended.endswith("h, the limit")
    assert 1 <= outcome.seconds < 20 and outcome.code


def test_nothing_outlives_a_run(run, tmp_path):
    mark = f"mark-of-{tmp_path.name}-{os.getpid()}"
    idle = [sys.executable, "-c", "import time; time.sleep(300)", mark]
    code = "import subprocess, time\n"
    code += f"subprocess.Popen({idle}, start_new_session=True); time.sleep(0.3)"
    run(code)
    assert not alive(mark)
    outcome, _, _ = run(code + "; time.sleep(60)", Limits(hours=1 / 3600))
    assert outcome.ended and not alive(mark)


def test_nothing_outlives_the_process_that_started_it(isolated, tmp_path):
    mark = f"mark-of-{tmp_path.name}-{os.getpid()}"
    (tmp_path / "input").mkdir(exist_ok=True)
    idle = f"[sys.executable, '-c', 'import time; time.sleep(300)', {mark!r}]"
    code = (
        "import sys; from pathlib import Path; from kit.kaggle import sandbox\n"
        f"with sandbox.confined({idle}, Path({str(tmp_path)!r}), sandbox.Limits(),"
        f" isolated={isolated}) as box: sandbox.watch(box)"
    )
    own = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(alive(mark)) < 2 and own.poll() is None:  # own's command line has it, too
        time.sleep(0.05)
    inside = [pid for pid in alive(mark) if pid != own.pid]
    own.send_signal(signal.SIGKILL)
    own.wait()
    assert inside and all(gone(pid) for pid in inside)


def test_a_look_ends_a_run_and_its_files_stay_readable(run, isolated, tmp_path):
    code = "import time; open('a', 'w').write('content'); time.sleep(60)"
    with confined(code, tmp_path, isolated=isolated) as box:
        outcome = sandbox.watch(
            box, lambda seconds: "enough" * (box.working / "a").exists()
        )
        assert (box.working / "a").read_text() == "content"
    assert outcome.ended == "enough"


def test_without_namespaces_the_plain_form_is_taken_and_the_reason_told(
    tmp_path, monkeypatch
):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "unshare"
    tool.write_text(
        "#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with confined("print('on')", tmp_path) as box:
        assert not sandbox.watch(box).code
        assert not box.isolated and "Operation not permitted" in box.refusal
        assert (box.network, box.readonly) == ("socket guard", "compared")
    with (
        pytest.raises(OSError, match="Operation not permitted"),
        confined("", tmp_path, isolated=True),
    ):
        pass
