"""Kaggle on the loopback: what its client says and hears, in memory, with faults on order.

The unmodified client reaches it as its http proxy, so requests carry whole URLs. Nothing is
forgotten while it stands: a second publish finds what the first one left.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

HOST = "http://localhost"  # what the client takes Kaggle's address to be
States = Sequence[str] | Callable[[], str]


@dataclass(frozen=True)
class Fault:
    """What the next request of one method meets instead of an honest answer."""

    status: int = 0  # answers this code and nothing is done; 0: no answer of its own
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    least: int = 0  # leaves shorter requests alone and waits for a longer one
    keep: int = 0  # bytes of an upload that arrive before the fault
    drop: bool = False  # closes the connection instead of answering
    done: bool = False  # does what was asked before the fault
    hang: threading.Event | None = None  # set when those bytes are here; then silence
    silent: bool = False  # takes the request and never answers
    cut: int | None = None  # bytes of the honest body that are sent; then silence, or
    pause: float = 0.0  # seconds between all others, or
    early: bool = False  # the end of the connection
    said: int | None = None  # Content-Length of a body that comes as a chunk


@dataclass(frozen=True)
class Request:
    """One request: the RPC's name, or PUT or GET; `body` is JSON or the bytes."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Blob:
    name: str
    size: int
    content: bytes = b""


@dataclass
class Kernel:
    request: dict[str, Any]  # SaveKernel's, of the newest version
    version: int
    states: States


class Absent(Exception):
    """The server answers 404."""


class Kaggle:
    """The server; attributes are what tests set before and read after."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: dict[str, list[Fault]] = {}
        self.lost: set[str] = set()  # names that the next dataset version lacks
        self.expired: set[str] = set()  # upload tokens that are no longer known
        self.dataset_states: States = ("READY",)
        self.kernel_states: States = ("QUEUED", "RUNNING", "COMPLETE")
        self.submission_states: States = ("PENDING", "COMPLETE")
        self.failure = (
            ""  # failureMessage of a kernel, errorDescription of a submission
        )
        self.log = ""
        self.outputs: dict[str, bytes] = {}
        self.page = 20  # files a page
        self.late = 0  # how often a variation is asked for until it tells a new version
        self.datasets: dict[str, list[dict[str, bytes]]] = {}  # versions of each
        self.kernels: dict[str, Kernel] = {}
        # versions of each variation, by framework and slug, of each model
        self.models: dict[str, dict[tuple[str, str], list[dict[str, bytes]]]] = {}
        self.submissions: list[dict[str, Any]] = []
        self.tokens: Iterator[str] | None = None  # of the next pages of every list
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self._blobs: dict[str, Blob] = {}
        self.dataset_states_of: dict[str, States] = {}
        self._numbers, self._hidden = itertools.count(1), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Any, user: str, key: str) -> dict[str, str]:
        """Variables with which the client speaks to this server and to no other."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **{name: self.url for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")},
            "no_proxy": "",
            "NO_PROXY": "",
            "HOME": str(home),
            "TMPDIR": str(home),
            "KAGGLE_CONFIG_DIR": str(home),
            "KAGGLE_USERNAME": user,
            "KAGGLE_KEY": key,
        }

    def bodies(self, method: str) -> list[Any]:
        """What was sent by each request of a method, in order."""
        return [it.body for it in self.requests if it.method == method]

    def methods(self) -> list[str]:
        return [it.method for it in self.requests]

    def answer(self, method: str, body: dict[str, Any]) -> dict[str, Any] | str:
        """The JSON of a request well understood; a string is where it redirects to."""
        name = f"_{re.sub(r'(?<!^)(?=[A-Z])', '_', method).lower()}"
        found = getattr(self, name)(body)
        if self.tokens is not None and method.startswith("List"):
            found["nextPageToken"] = next(self.tokens)
        return found

    def put(self, token: str, content: bytes, span: str) -> tuple[int, dict[str, str]]:
        """Bytes of an upload, or a question how many are here (span `bytes */N`)."""
        if token in self.expired:
            return 404, {}
        blob = self._blobs[token]
        if span.startswith("bytes */"):
            whole = len(blob.content) == blob.size
        else:
            start = int(span.split()[1].split("-")[0]) if span else 0
            blob.content = blob.content[:start] + content
            whole = len(blob.content) == blob.size
        if whole:
            return 200, {}
        here = len(blob.content)
        return 308, {"Range": f"bytes=0-{here - 1}"} if here else {}

    def file(self, path: str) -> bytes:
        """The content behind a URL that an answer gave."""
        kind, *rest = path.strip("/").split("/", 4)
        if kind == "output":
            return self.outputs["/".join(rest)]
        if kind == "model":
            owner, slug, framework, last = rest
            variation, version, name = last.split("/")
            there = self.models[f"{owner}/{slug}"][framework, variation]
            return there[int(version) - 1][name]
        owner, slug, version, name = rest
        return self.datasets[f"{owner}/{slug}"][int(version) - 1][name]

    # blobs and datasets

    def _start_blob_upload(self, body: dict[str, Any]) -> dict[str, Any]:
        token = f"blob{next(self._numbers)}"
        self._blobs[token] = Blob(body["name"], body["contentLength"])
        return {"token": token, "createUrl": f"{HOST}/upload/{token}"}

    def _files(self, listed: list[dict[str, Any]]) -> dict[str, bytes]:
        blobs = [self._blobs[each["token"]] for each in listed]
        kept = {it.name: it.content for it in blobs if it.name not in self.lost}
        self.lost = set()
        return kept

    def _create_dataset(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if ref in self.datasets:
            return {"status": "error", "error": "The requested title is already in use"}
        self.datasets[ref] = [self._files(body["files"])]
        self.dataset_states_of[ref] = _copy(self.dataset_states)
        return {"ref": f"/{ref}", "url": f"{HOST}/{ref}", "status": "ok"}

    def _create_dataset_version(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = self._dataset(body)
        self.datasets[ref].append(self._files(body["body"]["files"]))
        self.dataset_states_of[ref] = _copy(self.dataset_states)
        return {"ref": f"/{ref}", "url": f"{HOST}/{ref}", "status": "ok"}

    def _get_dataset_status(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = self._dataset(body)
        return {"status": _next(self.dataset_states_of[ref])}

    def _get_dataset(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = self._dataset(body)
        return {"ref": ref, "currentVersionNumber": len(self.datasets[ref])}

    def _list_dataset_files(self, body: dict[str, Any]) -> dict[str, Any]:
        versions = self.datasets[self._dataset(body)]
        held = sorted(versions[body.get("datasetVersionNumber", 0) - 1].items())
        rows = [{"name": name, "totalBytes": len(data)} for name, data in held]
        return _paged("datasetFiles", rows, body, self.page)

    def _download_dataset(self, body: dict[str, Any]) -> str:
        ref = self._dataset(body)
        number = body.get("datasetVersionNumber", len(self.datasets[ref]))
        if body["fileName"] not in self.datasets[ref][number - 1]:
            raise Absent
        return f"{HOST}/data/{ref}/{number}/{body['fileName']}"

    def _dataset(self, body: dict[str, Any]) -> str:
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets:
            raise Absent
        return ref

    # models

    def _create_model(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if ref in self.models:
            return {"error": "The requested slug is already in use", "errorCode": 409}
        self.models[ref] = {}
        return {"id": next(self._numbers), "ref": ref, "url": f"{HOST}/{ref}"}

    def _get_model(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = f"{body['ownerSlug']}/{body['modelSlug']}"
        if ref not in self.models:
            raise Absent
        return {"id": 1, "ref": ref}

    def _create_model_instance(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["body"]
        there = self.models[f"{body['ownerSlug']}/{body['modelSlug']}"]
        key = given["framework"], given["instanceSlug"]
        if key in there:
            return {"error": "The instance exists already", "errorCode": 409}
        there[key] = [self._files(given["files"])]
        return {"id": next(self._numbers), "ref": "/".join(key)}

    def _create_model_instance_version(self, body: dict[str, Any]) -> dict[str, Any]:
        self._variation(body).append(self._files(body["body"]["files"]))
        self._hidden = self.late
        return {"id": next(self._numbers), "ref": body["instanceSlug"]}

    def _get_model_instance(self, body: dict[str, Any]) -> dict[str, Any]:
        newest = len(self._variation(body)) - (self._hidden > 0)
        self._hidden -= self._hidden > 0
        return {"slug": body["instanceSlug"], "versionNumber": newest}

    def _list_model_instance_version_files(
        self, body: dict[str, Any]
    ) -> dict[str, Any]:
        held = sorted(self._variation(body)[body["versionNumber"] - 1].items())
        rows = [{"name": name, "size": len(data)} for name, data in held]
        return _paged("files", rows, body, self.page)

    def _download_model_instance_version(self, body: dict[str, Any]) -> str:
        framework, number = body["framework"], body["versionNumber"]
        if body["path"] not in self._variation(body)[number - 1]:
            raise Absent
        place = f"{body['ownerSlug']}/{body['modelSlug']}/{framework}"
        return f"{HOST}/model/{place}/{body['instanceSlug']}/{number}/{body['path']}"

    def _variation(self, body: dict[str, Any]) -> list[dict[str, bytes]]:
        there = self.models[f"{body['ownerSlug']}/{body['modelSlug']}"]
        return there[body["framework"], body["instanceSlug"]]

    # kernels

    def _save_kernel(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = body["slug"]
        version = self.kernels[ref].version + 1 if ref in self.kernels else 1
        self.kernels[ref] = Kernel(body, version, _copy(self.kernel_states))
        return {"ref": f"/code/{ref}", "url": f"{HOST}/{ref}", "versionNumber": version}

    def _get_kernel(self, body: dict[str, Any]) -> dict[str, Any]:
        kernel = self._kernel(body)
        sent = kernel.request
        copied = ("datasetDataSources", "competitionDataSources", "machineShape")
        metadata = {name: sent[name] for name in copied if name in sent}
        return {
            "metadata": metadata
            | {"ref": sent["slug"], "currentVersionNumber": kernel.version},
            "blob": {"source": sent["text"], "language": "python"},
        }

    def _get_kernel_session_status(self, body: dict[str, Any]) -> dict[str, Any]:
        state = _next(self._kernel(body).states)
        failed = state in ("ERROR", "CANCEL_ACKNOWLEDGED") and self.failure
        return {"status": state} | ({"failureMessage": self.failure} if failed else {})

    def _list_kernel_session_output(self, body: dict[str, Any]) -> dict[str, Any]:
        self._kernel(body)
        rows = [
            {"fileName": name, "url": f"{HOST}/output/{name}"} for name in self.outputs
        ]
        return {"log": self.log} | _paged("files", rows, body, self.page)

    def _kernel(self, body: dict[str, Any]) -> Kernel:
        ref = f"{body['userName']}/{body['kernelSlug']}"
        if ref not in self.kernels:
            raise Absent
        return self.kernels[ref]

    # competitions and accounts

    def _create_code_submission(self, body: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        state = {"ref": number, "description": body["submissionDescription"]}
        states = _copy(self.submission_states)
        self.submissions.append(
            state | {"states": states, "of": body["competitionName"]}
        )
        return {"message": "Successfully submitted", "ref": number}

    def _list_submissions(self, body: dict[str, Any]) -> dict[str, Any]:
        there = [it for it in self.submissions if it["of"] == body["competitionName"]]
        rows = [{name: it[name] for name in ("ref", "description")} for it in there]
        return {"submissions": rows}

    def _get_submission(self, body: dict[str, Any]) -> dict[str, Any]:
        (one,) = (it for it in self.submissions if it["ref"] == body["ref"])
        state = _next(one["states"])
        answer = {"ref": one["ref"], "status": state}
        if state == "COMPLETE":
            answer |= {"publicScore": "0.5123", "privateScore": "0.4987"}
        return answer | ({"errorDescription": self.failure} if state == "ERROR" else {})

    def _get_submission_limits(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"numToday": 1, "numAllowedNow": 4}

    def _introspect_token(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"active": True, "username": "alice"}


def _copy(states: States) -> States:
    return states if callable(states) else list(states)


def _next(states: States) -> str:
    """The next of a sequence, whose last state stays."""
    if callable(states):
        return states()
    return states.pop(0) if len(states) > 1 else states[0]


def _paged(name: str, rows: list, body: dict[str, Any], size: int) -> dict[str, Any]:
    start = int(body.get("pageToken") or 0)
    more = {"nextPageToken": str(start + size)} if start + size < len(rows) else {}
    return {name: rows[start : start + size]} | more


def _handler(kaggle: Kaggle) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Requests are kept in `requests`, not printed."""

        def do_GET(self) -> None:
            self._serve("GET")

        def do_PUT(self) -> None:
            self._serve("PUT")

        def do_POST(self) -> None:
            self._serve(urlsplit(self.path).path.rpartition("/")[2])

        def _serve(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            with kaggle.lock:
                waiting = kaggle.faults.get(method)
                meant = waiting and length >= waiting[0].least
                fault = waiting.pop(0) if meant else None
            partial = fault and method == "PUT" and not fault.done
            data = self.rfile.read(min(fault.keep, length) if partial else length)
            rpc = method not in ("GET", "PUT")
            body = json.loads(data or b"{}") if rpc else data
            with kaggle.lock:
                kaggle.requests.append(Request(method, path, dict(self.headers), body))
                if partial:
                    token = path.rpartition("/")[2]
                    kaggle.put(token, data, self.headers.get("Content-Range", ""))
            if partial and fault.hang:
                fault.hang.set()
                self.rfile.read(length - len(data))  # until the client is gone
            if fault and fault.silent:
                kaggle.closed.wait(60)
                self.close_connection = True
                return
            bad = fault and (fault.cut is not None or fault.said is not None)
            answer = None
            if fault is None or fault.done or bad:
                answer = self._honest(method, path, body)
            if bad:
                self._send_badly(answer[1], fault)
            elif fault is not None and fault.drop:
                self.close_connection = True
                self.connection.close()
            elif fault is not None and fault.status:
                if partial:
                    self.rfile.read(length - len(data))
                self._send(fault.status, fault.body, fault.headers)
            elif answer is not None:
                self._send(*answer)

        def _send_badly(self, body: Any, fault: Fault) -> None:
            plain = isinstance(body, bytes)
            data = body if plain else json.dumps(body).encode()
            said = len(data) if fault.said is None else fault.said
            self.send_response(200)
            self.send_header(
                "Content-Type", "text/csv" if plain else "application/json"
            )
            self.send_header("Content-Length", str(said))
            if fault.said is not None:
                self.send_header("Transfer-Encoding", "chunked")
                data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):  # the client is gone
                self.wfile.write(data[: fault.cut])
                for byte in data[fault.cut :] if fault.pause else b"":
                    if kaggle.closed.wait(fault.pause):
                        return
                    self.wfile.write(bytes([byte]))
            if fault.cut is not None and not fault.early:
                kaggle.closed.wait(60)

        def _honest(self, method: str, path: str, body: Any) -> tuple:
            with kaggle.lock:
                try:
                    if method == "GET":
                        return 200, kaggle.file(path), {}
                    if method == "PUT":
                        token = path.rpartition("/")[2]
                        span = self.headers.get("Content-Range", "")
                        status, headers = kaggle.put(token, body, span)
                        return status, {}, headers
                    answer = kaggle.answer(method, body)
                except (Absent, KeyError):
                    return 404, {"code": 404, "message": f"{method}: not found"}, {}
            if isinstance(answer, str):
                return 302, {}, {"Location": answer}
            return 200, answer, {}

        def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            plain = isinstance(body, bytes)
            data = body if plain else json.dumps(body).encode()
            kind = "application/octet-stream" if plain else "application/json"
            self.send_response(status)
            for name, value in (headers | {"Content-Type": kind}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
