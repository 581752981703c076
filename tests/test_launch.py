import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit.launch import (
    Place,
    Rank,
    RankError,
    Stopped,
    entry,
    group,
    launch,
    time_left,
)
from kit.nodes.agent import name_cause

ROOT = Path(__file__).parents[1]

WORKER = """
import os, signal, sys, threading, time
from pathlib import Path

import torch

from kit.launch import Stopped, entry, group


@entry
def main(arguments=None):
    folder, task, *rest = sys.argv[1:] if arguments is None else arguments
    folder = Path(folder)
    with group() as rank:
        last = rank.rank == rank.world - 1
        if task == "sum":
            total = torch.tensor([float(rank.rank + 1)])
            if rank.world > 1:
                torch.distributed.all_reduce(total)
            print("sum", int(total), "of", rank.world, rest, flush=True)
            (folder / f"{rank.rank}").write_text(f"{rank.local} {os.getpid()}")
            return
        (folder / f"{rank.rank}.{os.getpid()}").touch()
        (folder / f"agent{rank.rank}.{os.getppid()}").touch()
        if task == "raise" and last:
            raise ValueError("no such\\nlabel")
        if task == "kill" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "raise once" and len(list(folder.glob(f"{rank.rank}.*"))) == 1:
            raise ValueError("the first time")
        if task in ("stop", "half"):
            time.sleep(rank.rank)  # the others are there until the last one is done
            if task == "half" and last:
                raise ValueError("not saved")
            (folder / f"saved{rank.rank}").touch()
            raise Stopped("saved, the time is over")
        if task == "stick" and last:
            threading.Thread(target=time.sleep, args=(600,)).start()
            raise ValueError("but one thread goes on")
        while task == "linger" and rank.main:
            print("still here", flush=True)
            time.sleep(0.1)
        torch.distributed.barrier()  # breaks when another rank is gone


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Folder for what ranks leave; modules `worker` and `broken` can be launched."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "broken.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the ranks are on the CPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    yield tmp_path
    sys.modules.pop("worker", None)


def test_importing_launch_does_not_import_torch():
    code = "import sys, kit.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_one_process_runs_in_this_process(worker, capsys):
    launch("worker", [str(worker), "sum"], processes=1, logs=worker / "logs")
    assert capsys.readouterr().out == "sum 1 of 1 []\n"
    assert (worker / "0").read_text() == f"0 {os.getpid()}"


def test_one_process_ignores_a_rank_that_its_caller_inherited(worker, monkeypatch):
    outer = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_PORT": "1"}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    launch("worker", [str(worker), "sum"], processes=1, logs=worker / "logs")
    assert (worker / "0").exists()
    assert {name: os.environ[name] for name in outer} == outer


def test_without_torchrun_a_group_is_one_rank_and_errors_pass_through():
    @entry
    def main(arguments=None):
        with group() as rank:
            assert rank == Rank(0, 1, 0, rank.device) and rank.main
            raise KeyError(*arguments)

    with pytest.raises(KeyError, match="as it is"):
        main(["as it is"])


def test_ranks_see_each_other_and_rank_0_prints_once(worker, capsys, monkeypatch):
    for name in ("RANK", "PET_NNODES", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"):
        monkeypatch.setenv(name, "7")  # what an outer torchrun said does not count
    odd = ["--x=1", "a b", "$$ ${local_rank}", ""]
    launch("worker", [str(worker), "sum", *odd], processes=2, logs=worker / "logs")
    assert capsys.readouterr().out == f"sum 3 of 2 {odd}\n"
    assert [(worker / name).read_text().split()[0] for name in "01"] == ["0", "1"]


def test_the_root_cause_is_the_rank_that_raised(worker, capsys):
    with pytest.raises(RankError) as error:
        launch("worker", [str(worker), "raise"], processes=2, logs=worker / "logs")
    message = str(error.value)
    assert message.startswith("rank 1: ValueError: no such label; its log is ")
    assert "raise ValueError" in Path(message.split("its log is ")[1]).read_text()
    assert "Traceback" not in capsys.readouterr().out  # rank 0's is only a consequence


def test_a_killed_rank_is_named_and_not_the_error_of_an_earlier_run(worker):
    stale = worker / "logs" / "earlier" / "run" / "attempt_0" / "1" / "error.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"message": {"message": "stale", "extraInfo": {"timestamp": 1}}}')
    (worker / "logs" / "earlier" / "cause.txt").write_text("stale")
    with pytest.raises(RankError, match="^rank 1 was killed by SIGKILL") as error:
        launch("worker", [str(worker), "kill"], processes=2, logs=worker / "logs")
    assert "stale" not in str(error.value)
    assert_all_end(processes(worker))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processes": 0}, "processes is 0; it must be at least 1"),
        (
            {"module": "no_such_module"},
            "no_such_module cannot be launched: there is no",
        ),
        ({"module": "no_such.module"}, "no_such.module cannot be launched: No module"),
        ({"processes": 3}, "3 processes do not fit on 2 CUDA devices"),
    ],
)
def test_what_cannot_run_is_refused(change, words, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    wanted = {"module": "kit.files", "arguments": [], "processes": 1} | change
    with pytest.raises(ValueError, match=words):
        launch(**wanted, logs=tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"node_rank": 1}, "node_rank 1 is not one of 1 nodes"),
        ({"nodes": 0}, "node_rank 0 is not one of 0 nodes"),
        ({"nodes": 2}, "2 nodes need rendezvous='host:port' of node 0, not ''"),
        ({"nodes": 2, "rendezvous": "a:99999"}, "not 'a:99999'"),
        ({"nodes": 2, "rendezvous": ":80"}, "not ':80'"),
        ({"nodes": 2, "rendezvous": "a"}, "not 'a'"),
        ({"max_restarts": -1}, "max_restarts is -1, not at least 0"),
        ({"patience": 0}, "patience is 0; it must be some seconds"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place, words):
    with pytest.raises(ValueError, match=words):
        Place(**place)


def test_a_host_may_be_an_ipv6_address():
    place = Place(2, 0, "[fe80::1]:29500")
    assert (place.host, place.port) == ("fe80::1", 29500)


@pytest.mark.slow
def test_the_environment_is_the_place_of_a_launch_that_names_none(worker, monkeypatch):
    for name, value in Place(2, 1, "localhost:1", 1, 0.5).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="node 1 waited 0.5 s for node 0") as error:
        launch("worker", [], processes=1, logs=worker / "logs")
    assert "localhost:1" in str(error.value)
    assert len(list((worker / "logs").iterdir())) == 1 + 1
    monkeypatch.setenv("KIT_NODES", "two")
    with pytest.raises(ValueError, match="KIT_NODES is 'two', not a number"):
        launch("worker", [], processes=1, logs=worker / "logs")


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_ranks_are_no_failure_and_are_waited_for(worker, processes):
    place = Place(max_restarts=1)  # which does not restart what was stopped
    with pytest.raises(Stopped, match="^saved, the time is over$"):
        launch(
            *("worker", [str(worker), "stop"]),
            processes=processes,
            logs=worker / "logs",
            place=place if processes == 2 else None,
        )
    saved = {path.name for path in worker.glob("saved*")}
    assert saved == {f"saved{rank}" for rank in range(processes)}


@pytest.mark.slow
def test_a_failure_beside_a_stop_is_a_failure(worker):
    with pytest.raises(RankError, match="rank 1: ValueError: not saved"):
        launch("worker", [str(worker), "half"], processes=2, logs=worker / "logs")


def test_the_time_that_is_left_is_told_by_the_environment(monkeypatch):
    monkeypatch.delenv("KIT_STOP_AT", raising=False)
    assert time_left() == math.inf
    monkeypatch.setenv("KIT_STOP_AT", str(time.time() + 100))
    assert 90 < time_left() <= 100
    monkeypatch.setenv("KIT_STOP_AT", "tomorrow")
    with pytest.raises(ValueError, match="KIT_STOP_AT is 'tomorrow', not a unix time"):
        time_left()


@pytest.mark.slow
def test_an_error_before_main_is_quoted_from_the_log(worker):
    with pytest.raises(RankError, match="exited with code 1: ModuleNotFoundError: No"):
        launch("broken", [], processes=2, logs=worker / "logs")


@pytest.mark.slow
def test_an_error_of_torchrun_itself_is_quoted(worker, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")
    with pytest.raises(RankError, match="torchrun exited with code 1: .*'soon'"):
        launch("worker", [], processes=2, logs=worker / "logs")


@pytest.mark.slow
def test_a_failed_rank_that_cannot_leave_is_ended_within_a_minute(worker):
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1: ValueError: but one thread goes on"):
        launch("worker", [str(worker), "stick"], processes=2, logs=worker / "logs")
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_ranks_are_restarted(worker, capsys):
    options = {"processes": 2, "logs": worker / "logs", "place": Place(max_restarts=1)}
    launch("worker", [str(worker), "raise once"], **options)
    assert len(list(worker.glob("[01].*"))) == 4
    assert "ValueError: the first time; its log" in capsys.readouterr().out


@pytest.mark.slow
def test_a_single_process_that_may_be_restarted_is_a_rank(worker):
    place = Place(max_restarts=2)
    options = {"processes": 1, "logs": worker / "logs", "place": place}
    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL"):
        launch("worker", [str(worker), "kill"], **options)
    assert len(list(worker.glob("0.*"))) == 3


@pytest.mark.slow
def test_launches_do_not_collide(worker):
    def one(name):
        (worker / name).mkdir()
        arguments = [str(worker / name), "sum"]
        launch("worker", arguments, processes=2, logs=worker / "logs")
        return (worker / name / "1").exists()

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(one, ["a", "b"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_ending_the_launcher_leaves_no_process_behind(worker, name):
    launcher = start_lingering(worker)
    launcher.send_signal(signal.Signals[name])
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == -signal.Signals[name]
    assert ("KeyboardInterrupt" in said) == (name == "SIGINT")
    assert_all_end(processes(worker))


@pytest.mark.slow
def test_killing_torchrun_leaves_no_rank_behind(worker):
    launcher = start_lingering(worker)
    pids = processes(worker)
    os.kill(pids.agent, signal.SIGKILL)
    assert "RankError: torchrun was killed by SIGKILL" in launcher.communicate()[1]
    assert_all_end(pids)


def start_lingering(worker):
    """A process that launches two ranks: one prints forever, one waits for it."""
    code = (
        "from pathlib import Path; from kit.launch import launch;"
        f"launch('worker', [{str(worker)!r}, 'linger'], processes=2, logs=Path('logs'))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{worker}"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=worker,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "still here\n"  # while the ranks are running
    give_up = time.monotonic() + 60
    while len(list(worker.glob("agent*"))) < 2:
        assert launcher.poll() is None and time.monotonic() < give_up
        time.sleep(0.1)
    return launcher


def processes(worker):
    """Process ids that the ranks wrote down: their own, and their torchrun's."""
    ranks = [int(path.suffix[1:]) for path in worker.glob("[01].*")]
    agents = {int(path.suffix[1:]) for path in worker.glob("agent*")}
    assert len(ranks) == 2 and len(agents) == 1
    return SimpleNamespace(ranks=ranks, agent=agents.pop())


def assert_all_end(pids, patience=40.0):
    alive = {*pids.ranks, pids.agent}
    give_up = time.monotonic() + patience
    while alive and time.monotonic() < give_up:
        alive = {pid for pid in alive if is_running(pid)}
        time.sleep(0.1)
    assert not alive


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and its parent did not look yet


TRACE = """\
Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in loop
    data = fetch(index)
{frames}RuntimeError: no room
in this place
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ValueError: no such\n  recipe", "ValueError: no such recipe"),
        (
            f"RuntimeError: {TRACE.format(frames='  File x, line 2' * 500 + chr(10))}",
            "RuntimeError: no room in this place",
        ),
        (
            (
                "Error: Traceback (most recent call last):\n  File a\nKeyError: 1\n"
                "The above exception was the direct cause of the following exception:\n"
                "Traceback (most recent call last):\n  File b\nOSError: the cause\n"
            ),
            "OSError: the cause",
        ),
        ("Traceback (most recent call last):\n  File a", "File a"),
        ("", ""),
    ],
)
def test_a_cause_is_the_last_exception_of_a_traceback(text, said):
    assert name_cause(text) == said


def test_a_long_cause_keeps_its_start_and_its_end():
    said = name_cause(f"OSError: {'a ' * 5000}the end")
    assert said.startswith("OSError: a ") and said.endswith(" the end")
    assert len(said) < 1010


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", "--workers 0"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "--workers"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "--workers"),
    ],
)
def test_a_cause_says_what_helps_where_that_is_known(text, option):
    assert name_cause(text).startswith(f"{text}; ") and option in name_cause(text)
    assert name_cause("ValueError: killed at sea") == "ValueError: killed at sea"


def test_ranks_of_one_machine_talk_over_its_loopback_interface(monkeypatch):
    launcher = import_module("kit.launch")  # `launch` is its function here
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert launcher._environment(2, alone=True)["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert "GLOO_SOCKET_IFNAME" not in launcher._environment(2)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert launcher._environment(2, alone=True)["GLOO_SOCKET_IFNAME"] == "eth7"


def test_cores_are_counted_where_the_system_has_no_affinity(monkeypatch):
    launcher = import_module("kit.launch")
    assert launcher.count_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launcher.count_cores() == 6
    assert launcher._environment(2)["OMP_NUM_THREADS"] == "3"
