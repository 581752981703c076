"""GLDv2's servers on the loopback: tars in the official form, with faults on order."""

import hashlib
import io
import json
import tarfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": 4, "index": 2, "test": 1}  # tars


@dataclass(frozen=True)
class Fault:
    """What the next GET of one path meets instead of an honest answer."""

    status: int = 0  # answers this code; 0: goes on below
    headers: Mapping[str, str] = field(default_factory=dict)  # added, or "" takes away
    keep: int = -1  # bytes of the answer's body before the connection ends; -1: all
    hang: bool = False  # silence instead of that end, until the server closes
    drip: float = 0.0  # seconds between two bytes
    whole: bool = False  # knows no ranges
    wild: bool = False  # answers a range without asking which version it is of
    chunked: bool = False
    body: bytes | None = None  # instead of the file


@dataclass
class Stub:
    """A server of some files; `with` opens and closes it."""

    files: dict[str, bytes]
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    heard: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # method, path, range
    pace: float = 0.0  # seconds between two pieces of 4 KiB
    on_get: object = None  # is called with the path before the answer

    def __enter__(self) -> Self:
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def asked(self, path: str) -> list[str]:
        """The ranges of the GET requests for a file, in order."""
        return [r for method, p, r in self.heard if method == "GET" and p == path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(head=True)

            def do_GET(self) -> None:
                self.answer(head=False)

            def answer(self, head: bool) -> None:
                path = self.path.lstrip("/")
                span = self.headers.get("Range", "")
                stub.heard.append((self.command, path, span))
                if stub.on_get and not head:
                    stub.on_get(path)
                queue = stub.faults.get(path)
                fault = queue.pop(0) if queue and not head else Fault()
                self.close_connection = True
                try:
                    stub._send(self, path, span, fault, head)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had enough

        return Handler

    def _send(self, handler, path: str, span: str, fault: Fault, head: bool) -> None:
        data = fault.body if fault.body is not None else self.files.get(path)
        status, headers = 200, {}
        if fault.status or data is None:
            status, data = fault.status or 404, b"no"
        else:
            tag = f'"{hashlib.md5(data).hexdigest()}"'
            headers = {"ETag": tag, "Last-Modified": formatdate(0, usegmt=True)}
            same = handler.headers.get("If-Range") in (None, tag) or fault.wild
            if span and same and not fault.whole:
                begin = int(span.removeprefix("bytes=").rstrip("-"))
                if begin >= len(data):
                    headers["Content-Range"] = f"bytes */{len(data)}"
                    status, data = 416, b""
                else:
                    last = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                    status, headers["Content-Range"] = 206, last
                    data = data[begin:]
        if not fault.chunked:
            headers["Content-Length"] = str(len(data))
        else:
            headers["Transfer-Encoding"] = "chunked"
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        handler.send_response(status)
        for name, value in (headers | {**fault.headers}).items():
            if value:
                handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        if not head:
            self._body(handler, data, fault)

    def _body(self, handler, data: bytes, fault: Fault) -> None:
        end = len(data) if fault.keep < 0 else fault.keep
        step = 1 if fault.drip else 4096 if self.pace else max(1, end)
        for start in range(0, end, step):
            handler.wfile.write(data[start : min(end, start + step)])
            handler.wfile.flush()
            if self.closing.wait(fault.drip or self.pace):
                return
        if fault.hang:
            self.closing.wait(60)


def pack(files: Mapping[str, bytes], prefix: str = "./") -> bytes:
    """A tar in the official form: folders, and files under the names that it gives."""
    buffer, folders = io.BytesIO(), set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    made = tarfile.TarInfo(prefix + folder)
                    made.type, made.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(made)
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def offered(data: Path) -> dict[str, bytes]:
    """What the servers offer of a data folder in GLDv2's layout; images are dealt out to tars."""
    about = json.loads((ROOT / "datasets_meta/gldv2.json").read_text())["files"]
    found = {}
    for place, table in about["tables"].items():
        found[f"gl/{table['path']}"] = (data / place).read_bytes()
    for path in (data / "train/country").glob("*.json"):
        found[f"gld/{about['country'].format(code=path.stem)}"] = path.read_bytes()
    for split, count in COUNTS.items():
        paths = sorted((data / split).glob("?/?/?/*.jpg"))
        for number in range(count):
            names = {
                p.relative_to(data / split).as_posix(): p.read_bytes()
                for p in paths[number::count]
            }
            put(found, split, number, pack(names))
    return found


def put(files: dict[str, bytes], split: str, number: int, tar: bytes) -> None:
    """Offers a tar and its MD5."""
    name = f"images_{number:03d}"
    files[f"gl/{split}/{name}.tar"] = tar
    told = f"{hashlib.md5(tar).hexdigest()}  {name}.tar\n"
    files[f"gl/md5sum/{split}/md5.{name}.txt"] = told.encode()


def write_official(path: Path) -> Path:
    """The facts in gldv2.json, with as many tars as the stub has."""
    about = json.loads((ROOT / "datasets_meta/gldv2.json").read_text())
    for split, count in COUNTS.items():
        about["files"]["tars"][split] = {"count": count, "about_bytes": 100_000}
    path.write_text(json.dumps(about))
    return path


def wait_for(condition, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.005)
