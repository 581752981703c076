"""The agents of one launch on several nodes: how they meet, and end together.

They meet in the store that node 0's agent opens (torch elastic's c10d rendezvous). torchrun
alone would not tell one node that another has failed: its ranks would wait for their peers
until a collective times out. So every agent also leaves a sign of life and its failure in
that store, and ends its own ranks when another one fails, falls silent, or takes the store
with it. What counts is whether a sign changes, not the clock of the machine that wrote it.
"""

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.files import write_text

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LIVE = "[default0]:"  # torchrun's mark on the lines of its first rank
CAUSE = "cause.txt"  # in a run's folder: why it failed

LOOK = 0.5  # seconds between two looks at the other nodes
LOST = 25  # seconds without a sign of life
DOUBT = 2.0  # seconds a failure that may be a consequence waits for a better one
EXIT_TIMEOUT = 20  # seconds a failed process may take to leave
FAREWELL = 5.0  # seconds the store stays for nodes that have not seen the outcome


@dataclass(frozen=True)
class Node:
    """One machine among those of a launch."""

    nodes: int = 1
    rank: int = 0
    host: str = ""  # of node 0
    port: int = 0
    launch: str = ""  # the same on every node, another one for another launch
    patience: float = 0.0  # seconds to wait for the other nodes

    @property
    def endpoint(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Peers:
    """This node's agent among those of a launch, and the store between them.

    Keys, each with the number of its node: `seat` (taken once, so nobody comes back into a
    run that has lost him), `alive` (a counter), `failed`, `over` (its ranks are done),
    `bye` (it knows how the launch ended). Without a number: `launch` and `end`.
    """

    store: "TCPStore"  # torchrun's connection
    signs: "TCPStore"  # ours: a waiting torchrun must not block it

    def __init__(self, node: Node, run: Path) -> None:
        self.node, self.run = node, run
        self.met = False
        self.ended = False  # by the watcher
        self.leaving = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def meet(self) -> None:
        """Opens the store on node 0; elsewhere waits for it, and takes this node's seat."""
        node = self.node
        if node.rank == 0:
            self.store = self._connect(True)
            self.store.set("launch", node.launch)
            self._take_seat(self.store)
        else:
            self.store = self._find()
        self.signs = self._connect(False)
        self.met = True
        self.watcher.start()

    def flags(self) -> list[str]:
        """torchrun's, for its c10d rendezvous in this store, with nodes in their order.

        It would sort them by address. Only the first one's address is ever used, so the
        others' may be anything that sorts behind it.
        """
        node = self.node
        conf = {
            "is_host": "false",  # this process is, or that of node 0
            "join_timeout": math.ceil(node.patience),
            "keep_alive_max_attempt": 1_000_000,  # it would compare the machines' clocks
        }
        return [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={node.endpoint}",
            f"--rdzv-id={node.launch}",
            "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in conf.items()),
            f"--local-addr={node.host}" + f"/{node.rank:06d}" * (node.rank > 0),
        ]

    def finish(self) -> None:
        """Returns when the ranks of every node are done; without it one node might call
        a success what another one calls a failure.
        """
        self._say("over")
        if self.node.rank == 0:
            while not all(self._heard("over", n) for n in range(self.node.nodes)):
                time.sleep(0.1)
            self.signs.set("end", "1")
        while not self.signs.check(["end"]):
            time.sleep(0.1)

    def fail(self, text: str, doubtful: bool = False) -> None:
        """Tells the other nodes, and the launcher unless it has been told another reason.

        doubtful: it may be the consequence of another node's failure.
        """
        self.leaving.set()
        with suppress(RuntimeError):  # the store may be what failed
            if self.met and not self.ended:
                self._say("failed", json.dumps([doubtful, text]))
            deadline = time.monotonic() + DOUBT
            while self.met and doubtful and time.monotonic() < deadline:
                for rank, (unsure, said) in self._failures():
                    if not unsure:
                        self._tell(f"another node failed: node {rank}: {said}")
                        return
                time.sleep(0.1)
        self._tell(text)

    def leave(self) -> None:
        """The store ends with node 0, so that one goes last."""
        if not self.met:
            return
        self.leaving.set()
        self.watcher.join()
        signal.alarm(EXIT_TIMEOUT)
        with suppress(RuntimeError):
            self._say("bye")
            give_up = time.monotonic() + FAREWELL
            while self.node.rank == 0 and time.monotonic() < give_up:
                if all(map(self._is_gone, range(self.node.nodes))):
                    break
                time.sleep(0.1)

    def _connect(self, serve: bool) -> "TCPStore":
        from torch.distributed import TCPStore

        return TCPStore(
            self.node.host,
            self.node.port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=LOST),
        )

    def _find(self) -> "TCPStore":
        """A store at the port may also be that of an earlier launch or attempt."""
        node, waiting = self.node, False
        give_up = time.monotonic() + node.patience
        while True:
            with suppress(OSError, RuntimeError):
                socket.create_connection((node.host, node.port), LOST).close()
                store = self._connect(False)
                if self._is_ours(store) and self._take_seat(store):
                    return store
            if time.monotonic() > give_up:
                raise TimeoutError(
                    f"node {node.rank} waited {node.patience:g} s for node 0 "
                    f"to make the same launch at {node.endpoint}"
                )
            if not waiting:
                said = f"node {node.rank} waits for node 0 at {node.endpoint}"
                print(f"{LIVE}{said}", flush=True)
                waiting = True
            time.sleep(LOOK)

    def _is_ours(self, store: "TCPStore") -> bool:
        return store.check(["launch"]) and store.get("launch").decode() == (
            self.node.launch
        )

    def _take_seat(self, store: "TCPStore") -> bool:
        mine = f"{os.getpid()} {time.time_ns()}"
        return store.compare_set(f"seat{self.node.rank}", "", mine).decode() == mine

    def _say(self, key: str, value: str = "1") -> None:
        self.signs.set(f"{key}{self.node.rank}", value)

    def _heard(self, key: str, rank: int) -> str:
        name = f"{key}{rank}"
        return self.signs.get(name).decode() if self.signs.check([name]) else ""

    def _is_gone(self, rank: int) -> bool:
        return bool(self._heard("bye", rank)) or not self._heard("seat", rank)

    def _failures(self) -> Iterator[tuple[int, Any]]:
        for rank in range(self.node.nodes):
            said = self._heard("failed", rank)
            if rank != self.node.rank and said:
                yield rank, json.loads(said)

    def _watch(self) -> None:
        beats: dict[int, tuple[str, float]] = {}  # node -> its sign of life, since when
        doubt, count = 0.0, 0
        while not self.leaving.wait(LOOK):
            signal.alarm(LOST + EXIT_TIMEOUT // 2)  # ends this process if a call hangs
            count += 1
            try:
                self._say("alive", str(count))
                if self.node.rank == 0 and count == 6:
                    self._name_absent()
                for rank, (doubtful, text) in self._failures():
                    doubt = doubt or time.monotonic() + DOUBT
                    if not doubtful or time.monotonic() > doubt:
                        return self._end(f"node {rank}: {text}")
                if lost := self._silent(beats):
                    return self._end(f"node {lost[0]} does not answer any more")
            except RuntimeError:  # of the store
                return self._end("node 0 is gone")

    def _name_absent(self) -> None:
        for rank in range(self.node.nodes):
            if not self._heard("seat", rank):
                where = self.node.endpoint
                print(f"{LIVE}node 0 waits for node {rank} at {where}", flush=True)

    def _silent(self, beats: dict[int, tuple[str, float]]) -> list[int]:
        now = time.monotonic()
        for rank in range(self.node.nodes):
            beat = self._heard("alive", rank)
            if beat and beat != beats.get(rank, ("", 0.0))[0]:
                beats[rank] = (beat, now)
        late = [rank for rank, (_, since) in beats.items() if now - since > LOST]
        return [rank for rank in late if not self._heard("bye", rank)]

    def _end(self, text: str) -> None:
        """Ends torchrun, which ends its ranks; if it cannot, they end with this process."""
        self._tell(f"another node failed: {text}")
        self.ended = True
        signal.alarm(EXIT_TIMEOUT)
        os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, text: str) -> None:
        """The first reason counts; the watcher's comes before its consequences."""
        if not (self.run / CAUSE).exists():
            write_text(self.run / CAUSE, text)
