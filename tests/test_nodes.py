"""Two nodes on one machine: two launchers, real torchruns and ranks, the loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit import files
from kit.launch import Place, RankError, Stopped, launch, serve
from kit.nodes import session
from kit.nodes.session import Call, Lost

ROOT = Path(__file__).parents[1]
PATIENCE = 90.0

WORKER = """
import os, signal, sys, time
from pathlib import Path

import torch

from kit.launch import Stopped, entry, group


@entry
def main(arguments=None):
    folder, task = sys.argv[1:] if arguments is None else arguments
    folder = Path(folder)
    assert "KIT_NODES" not in os.environ and "KIT_CALLS" not in os.environ
    with group() as rank:
        node = Path(os.environ["KIT_LAUNCH_FOLDER"]).parent.name
        (folder / f"{task}.{rank.rank}.{os.getpid()}.{os.getppid()}.{node}").touch()
        first = len(list(folder.glob(f"{task}.{rank.rank}.*"))) == 1
        last = rank.rank == rank.world - 1
        total = torch.tensor([float(rank.rank + 1)])
        torch.distributed.all_reduce(total)
        if rank.main:
            print(task, "of", rank.world, "is", int(total), flush=True)
        if task == "stop":
            time.sleep(rank.rank)
            (folder / f"saved{rank.rank}").touch()
            raise Stopped("saved")
        if task == "raise" and last or task == "once" and last and first:
            raise ValueError("no such label")
        if task in ("kill", "abort") and last:
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "late" and last:
            torch.distributed.destroy_process_group()
            time.sleep(3)
            os._exit(7)
        if task == "late":
            return
        # not in a collective: hears nothing
        while task in ("raise", "kill", "linger") or task == "again" and first:
            time.sleep(0.1)
        while task == "abort" and not (folder / "killed").exists():
            time.sleep(0.001)
        if task == "abort":
            os.abort()  # what NCCL does when a peer is gone
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Folder for what ranks leave; module `worker` can be launched."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the ranks are on the CPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    yield tmp_path
    sys.modules.pop("worker", None)


@pytest.fixture
def rendezvous():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def node(worker, rendezvous, rank, task, processes=1, wait=0.0, **more):
    """One node's launch: "" or how it failed."""
    time.sleep(wait)
    place = Place(2, rank, rendezvous, **{"patience": PATIENCE} | more)
    logs = worker / f"node{rank}"
    try:
        launch(
            "worker", [str(worker), task], processes=processes, logs=logs, place=place
        )
    except (RankError, Stopped) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def both(worker, rendezvous, task, waits=(0.0, 0.0), **more):
    """Both nodes' launches at once, each on a thread."""

    def one(rank):
        return node(worker, rendezvous, rank, task, wait=waits[rank], **more)

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(one, [0, 1]))
    assert_all_end(worker)
    return ends


def left(worker):
    """What ranks wrote down: task, rank, process, torchrun's process, node."""
    found = [path.name.split(".") for path in worker.glob("*.*.*.*.node*")]
    return [(t, int(r), int(p), int(a), n) for t, r, p, a, n in found]


def assert_all_end(worker, patience=60.0):
    alive = {pid for _, _, *pids, _ in left(worker) for pid in pids}
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


def wait_for(condition, seconds=90.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.1)


# One launch


@pytest.mark.slow
@pytest.mark.parametrize("waits", [(0, 5), (5, 0)], ids=["0 first", "1 first"])
def test_nodes_form_one_group_in_their_order(worker, rendezvous, capsys, waits):
    assert both(worker, rendezvous, "sum", waits, processes=2) == ["", ""]
    said = capsys.readouterr().out.splitlines()
    assert said.count("sum of 4 is 10") == 1  # rank 0's, on its node
    late = 1 if waits[1] else 0
    assert f"node {1 - late} waits for node {late} at {rendezvous}" in said
    places = {rank: node for _, rank, _, _, node in left(worker)}
    assert places == {0: "node0", 1: "node0", 2: "node1", 3: "node1"}


@pytest.mark.slow
def test_consecutive_launches_at_one_port_do_not_meet(worker, rendezvous):
    def one(rank):
        tasks = ["a", "b", "b", "c"]
        return [node(worker, rendezvous, rank, task) for task in tasks]

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(one, [0, 1])) == [[""] * 4] * 2
    ran = sorted((task, rank) for task, rank, *_ in left(worker))
    assert ran == sorted((task, rank) for task in "abbc" for rank in (0, 1))


@pytest.mark.slow
def test_launches_of_different_things_do_not_meet(worker, rendezvous):
    def one(rank):
        return node(worker, rendezvous, rank, "ab"[rank], patience=8)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(one, [0, 1])
    assert first == f"RankError: not all of 2 nodes came to {rendezvous} within 8 s"
    assert second.startswith("RankError: node 1 waited 8 s for node 0 to make the same")
    assert not left(worker)


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(worker):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = node(worker, f"127.0.0.1:{port}", 0, "sum")
    assert "RankError: " in said and f"port: {port}" in said and "EADDRINUSE" in said


# Failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("raise", "rank 1: ValueError: no such label; its log is "),
        ("kill", "rank 1 was killed by SIGKILL (out of memory?); its log is "),
        ("abort", "rank 1 was killed by SIGKILL (out of memory?); its log is "),
        ("late", "rank 1 exited with code 7: no output; its log is "),
    ],
)
def test_a_rank_that_fails_ends_all_nodes_and_is_named(
    worker, rendezvous, task, reason
):
    began = time.monotonic()
    first, second = both(worker, rendezvous, task)
    assert time.monotonic() - began < 60
    assert second.startswith(f"RankError: {reason}")
    assert first == f"RankError: another node failed: node 1: {second[11:]}"
    assert Path(second.split("its log is ")[1]).is_relative_to(worker / "node1")


@pytest.mark.slow
def test_all_nodes_start_again(worker, rendezvous, capsys):
    assert both(worker, rendezvous, "once", max_restarts=1) == ["", ""]
    assert sorted(rank for _, rank, *_ in left(worker)) == [0, 0, 1, 1]
    said = capsys.readouterr().out
    assert said.count("restart 1 of 1") == 2
    assert said.count("once of 2 is 3") == 2


@pytest.mark.slow
def test_stopped_ranks_stop_both_launches(worker, rendezvous):
    ends = both(worker, rendezvous, "stop", max_restarts=1)
    assert ends == ["Stopped: saved"] * 2
    assert {path.name for path in worker.glob("saved*")} == {"saved0", "saved1"}
    assert len(left(worker)) == 2


def launcher(worker, rendezvous, rank, task):
    """A node's launch in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from kit.launch import Place, launch\n"
        "folder, rendezvous, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "launch('worker', [str(folder), sys.argv[4]], processes=1,\n"
        "       logs=folder / f'node{rank}', place=Place(2, rank, rendezvous))"
    )
    given = [str(worker), rendezvous, str(rank), task]
    return subprocess.Popen(
        [sys.executable, "-c", code, *given],
        cwd=worker,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def lingering(worker, rendezvous):
    """Two launchers whose ranks are running."""
    launchers = [launcher(worker, rendezvous, rank, "linger") for rank in (0, 1)]
    try:
        wait_for(lambda: len(left(worker)) == 2)
        yield launchers
    finally:
        for each in launchers:
            each.kill()
            each.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_that_ends_takes_the_other_node_along(
    worker, rendezvous, rank, name
):
    with lingering(worker, rendezvous) as launchers:
        launchers[rank].send_signal(signal.Signals[name])
        said = launchers[1 - rank].communicate(timeout=60)[1]
        launchers[rank].wait(60)
        assert_all_end(worker)
    assert said.splitlines()[-1] == (
        f"kit.launch.RankError: another node failed: node {rank}: it was interrupted"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_lost_ends_the_other(worker, rendezvous, rank, number):
    with lingering(worker, rendezvous) as launchers:
        agents = {node: agent for _, _, _, agent, node in left(worker)}
        os.kill(agents[f"node{rank}"], number)
        said = launchers[1 - rank].communicate(timeout=60)[1]
        os.kill(launchers[rank].pid, signal.SIGKILL)
        if number == signal.SIGSTOP:
            os.kill(agents[f"node{rank}"], signal.SIGCONT)
        assert_all_end(worker)
    gone = (
        "is gone"
        if (rank, number) == (0, signal.SIGKILL)
        else "does not answer any more"
    )
    assert said.splitlines()[-1] == (
        f"kit.launch.RankError: another node failed: node {rank} {gone}"
    )


@pytest.mark.slow
def test_a_node_that_comes_back_joins_the_next_attempt(worker, rendezvous):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            node, worker, rendezvous, 0, "again", max_restarts=1, processes=1
        )
        lost = launcher(worker, rendezvous, 1, "again")
        wait_for(lambda: len(left(worker)) == 2)
        os.kill({node: agent for *_, agent, node in left(worker)}["node1"], 9)
        lost.kill()
        lost.communicate()
        # at once, while node 0 still waits for a sign of life from the dead one
        assert node(worker, rendezvous, 1, "again") == ""
        assert first.result() == ""
    assert sorted(rank for _, rank, *_ in left(worker)) == [0, 0, 1, 1]


PEERS = """
import json, sys, time
from pathlib import Path
from kit.nodes.peers import Node, Peers

node, run, how, late = Node(**json.loads(sys.argv[1])), Path(sys.argv[2]), *sys.argv[3:]
peers = Peers(node, run)
peers.meet()
if node.rank == int(late):
    while not (run / "early").exists():
        time.sleep(0.1)
    time.sleep(2)
    (run / "late").touch()
    if how == "fails":
        peers.fail("no room")
        sys.exit(peers.leave())
(run / "early").touch()
peers.finish()
print((run / "late").exists())
peers.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "fails"])
@pytest.mark.parametrize("late", [0, 1])
def test_a_node_that_is_done_waits_for_how_the_other_ends(
    tmp_path, rendezvous, how, late
):
    host, port = rendezvous.split(":")
    runs = [tmp_path / str(rank) for rank in (0, 1)]
    processes = []
    for rank, run in enumerate(runs):
        run.mkdir()
        for name in ("early", "late"):  # shared, unlike why each of them failed
            (run / name).symlink_to(tmp_path / name)
        given = [2, rank, host, int(port), "x", 60.0]
        names = ("nodes", "rank", "host", "port", "launch", "patience")
        place = json.dumps(dict(zip(names, given, strict=True)))
        command = [sys.executable, "-c", PEERS, place, str(run), how, str(late)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=90)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if how == "ends":
        assert codes == [0, 0]
        assert said[1 - late].splitlines()[-1] == "True"
    else:
        assert codes[1 - late] == -signal.SIGTERM and "True" not in said[1 - late]
        causes = [(run / "cause.txt").read_text() for run in runs]
        assert causes[late] == "no room"
        assert causes[1 - late] == f"another node failed: node {late}: no room"


# A pipeline on node 0, served by node 1


CALL = Call("worker", ("a", "b c"), "/logs", 1)


def followed(folder, **limits):
    """Everything that `follow` yields, and how it ended."""
    calls = []
    try:
        calls.extend(session.follow(folder, **{"patience": 5.0} | limits))
    except Lost as lost:
        return calls, str(lost)
    return calls, ""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(session, "BEAT", 0.05)
    monkeypatch.setattr(session, "LOOK", 0.02)


def test_each_call_is_followed_once_until_the_pipeline_is_over(tmp_path, quick):
    with ThreadPoolExecutor() as pool:
        with session.host(tmp_path):
            result = pool.submit(followed, tmp_path)
            for _ in range(2):  # the same thing twice is two calls
                with session.calling(tmp_path, CALL):
                    time.sleep(0.5)
                time.sleep(0.2)
        assert result.result() == ([CALL, CALL], "")


def test_a_node_may_come_late_or_again(tmp_path, quick):
    with ThreadPoolExecutor() as pool:
        with session.host(tmp_path), session.calling(tmp_path, CALL):
            time.sleep(0.2)
            results = [pool.submit(followed, tmp_path) for _ in range(2)]
            time.sleep(0.5)
        assert [each.result() for each in results] == [([CALL], "")] * 2


class Enough(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (Enough("8 h"), ""),
        (ValueError("no data"), "the pipeline of node 0 ended: no data"),
        (KeyboardInterrupt(), "the pipeline of node 0 ended: interrupted"),
    ],
)
def test_the_end_of_the_pipeline_is_told(tmp_path, quick, error, end):
    with ThreadPoolExecutor() as pool:
        with pytest.raises(type(error)), session.host(tmp_path, Enough):
            result = pool.submit(followed, tmp_path)
            time.sleep(0.3)
            raise error
        assert result.result() == ([], end)


def test_what_an_earlier_pipeline_left_is_not_followed(tmp_path, quick):
    assert followed(tmp_path, patience=0.2) == (
        [],
        f"{tmp_path}: no pipeline of node 0 within 0.2 s (none runs)",
    )
    with session.host(tmp_path):
        pass
    files.write_json(tmp_path / "call.json", {"id": "old"})
    _, end = followed(tmp_path, patience=0.2)
    assert end.endswith("within 0.2 s (the one there is over)")
    with ThreadPoolExecutor() as pool:
        result = pool.submit(followed, tmp_path)
        time.sleep(0.2)
        with session.host(tmp_path):  # it may be over before anyone sees it running
            pass
        assert result.result() == ([], "")
    assert not (tmp_path / "call.json").exists()


def test_a_pipeline_that_falls_silent_is_lost(tmp_path, quick):
    path = tmp_path / "session.json"
    with ThreadPoolExecutor() as pool:
        files.write_json(path, {"session": "a", "beat": 1, "ended": ""})
        result = pool.submit(followed, tmp_path, silence=0.4)
        time.sleep(0.2)
        files.write_json(path, {"session": "a", "beat": 2, "ended": ""})
        assert result.result() == ([], "node 0 gave no sign of life for 0.4 s")


def test_two_pipelines_do_not_lead_the_same_nodes(tmp_path, monkeypatch):
    lock = files.lock
    monkeypatch.setattr(files, "lock", lambda folder: lock(folder, patience=0.1))
    refused = pytest.raises(RuntimeError, match="another process")
    with session.host(tmp_path), refused, session.host(tmp_path):
        pass


@pytest.mark.slow
def test_a_served_pipeline_has_its_launches_on_both_nodes(
    worker, rendezvous, monkeypatch, capsys
):
    calls, place = worker / "calls", Place(2, 0, rendezvous, patience=PATIENCE)
    serving = threading.Thread(
        target=serve, args=(calls, 1, Place(2, 1, rendezvous, patience=PATIENCE))
    )
    serving.start()
    for name, value in place.environment(calls).items():
        monkeypatch.setenv(name, value)
    with session.host(calls):
        for task in ("a", "raise", "b"):
            expected = contextlib.nullcontext()
            if task == "raise":
                expected = pytest.raises(RankError, match="node 1: rank 1: ValueError")
            with expected:
                launch("worker", [str(worker), task], processes=1, logs=worker / "node")
    serving.join(30)
    assert not serving.is_alive()
    ran = sorted((task, rank) for task, rank, *_ in left(worker))
    assert ran == [(task, rank) for task in ("a", "b", "raise") for rank in (0, 1)]
    said = capsys.readouterr().out
    assert said.count("joining worker") == 3
    assert json.loads((calls / "session.json").read_text())["ended"] == "well"
