"""The only door to Kaggle's client: calls that are repeated with care, answers that are read.

The client answers many failures with exit code 0, and authenticates (and prints) when it is
imported; so it is imported inside functions, its calls are made in this process, and what it
prints is not passed on. No message leaves here with a credential in it.
"""

import base64
import io
import json
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from kit import files
from kit.kaggle import uploads

Answer = TypeVar("Answer")
TRIES, FIRST_WAIT = 6, 2.0  # seconds; doubled after each try
CHUNK = 1 << 20
HINTS = {
    401: "Kaggle does not accept these credentials; make new ones in its settings",
    403: "not allowed: wrong owner or slug, or the competition's rules are not accepted",
    404: "there is no such thing on Kaggle",
    429: "too many requests; wait and run the same command again",
}


class KaggleError(RuntimeError):
    """What Kaggle did not do, and why, in one line."""


@dataclass(frozen=True)
class Clock:
    """Seconds, and how to let them pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Kernel:
    """The newest version of a kernel on the server."""

    version: int
    source: str
    sources: frozenset[str]  # datasets as owner/slug, competitions by slug


class Server:
    """Kaggle, as the signed-in user sees it; keeps nothing between two calls."""

    def __init__(self, clock: Clock, say: Callable[[str], None]) -> None:
        self.clock = clock
        self._say = say
        self._screen: Any = None  # where `say` prints while the client may not
        self._secrets: list[str] = []
        self._api = self._sign_in()
        values = self._api.config_values
        pair = f"{values.get('username')}:{values.get('key')}".encode()
        found = [values.get("key"), values.get("token")]
        found.append(base64.b64encode(pair).decode())
        self._secrets = [it for it in found if it and len(it) > 3]

    def say(self, text: str) -> None:
        with redirect_stdout(self._screen or sys.stdout):
            self._say(self.redact(text))

    def redact(self, text: str) -> str:
        """The text without credentials, wherever it came from."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    # datasets

    def dataset_status(self, ref: str) -> str | None:
        """In small letters, such as ready; None when there is no such dataset of ours."""
        return self._ask(
            f"dataset {ref}",
            lambda: self._api.dataset_status(ref),
            absent=(403, 404),  # a dataset that is not there may answer either
        )

    def dataset_version(self, ref: str) -> int:
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

        owner, slug = ref.split("/")
        request = _filled(ApiGetDatasetRequest(), owner_slug=owner, dataset_slug=slug)
        path = "datasets.dataset_api_client.get_dataset"
        return self._call(f"dataset {ref}", path, request).current_version_number or 0

    def dataset_files(self, ref: str, version: int) -> dict[str, int]:
        """Bytes of every file of a version, by name."""
        found, token = {}, None
        while True:
            page = self._ask(
                f"dataset {ref}: its files",
                lambda token=token: self._api.dataset_list_files(
                    f"{ref}/{version}", page_token=token, page_size=200
                ),
            )
            if page.error_message:
                raise self._error(f"dataset {ref}: its files", page.error_message)
            found |= {it.name: it.total_bytes for it in page.dataset_files or []}
            token = page.next_page_token
            if not token:
                return found

    def dataset_file(self, ref: str, version: int, name: str) -> bytes | None:
        """The content of a small file of a version; None when it has none."""
        with TemporaryDirectory() as folder:
            got = self._ask(
                f"dataset {ref}: {name}",
                lambda: self._api.dataset_download_file(
                    f"{ref}/{version}", name, path=folder, force=True
                ),
                absent=(403, 404),
            )
            if not got:
                return None
            (path,) = Path(folder).iterdir()
            if zipfile.is_zipfile(path):  # Kaggle may pack a file on its way down
                with zipfile.ZipFile(path) as packed:
                    return packed.read(name)
            return path.read_bytes()

    def create_dataset(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """A new private dataset from the files of a folder; all of them, or an error."""
        from kagglesdk.datasets.types.dataset_api_service import ApiCreateDatasetRequest

        ref = metadata["id"]
        owner, slug = ref.split("/")
        request = _filled(
            ApiCreateDatasetRequest(),
            **_described(metadata),
            **{"owner_slug": owner, "slug": slug, "title": metadata["title"]},
            license_name=metadata["licenses"][0]["name"],
            is_private=metadata.get("isPrivate", True),
            files=self._upload(ref, folder),
        )
        self._made(
            self._call(
                f"dataset {ref}: create",
                "datasets.dataset_api_client.create_dataset",
                request,
                arrived=lambda: self.dataset_status(ref),
            ),
            ref,
        )

    def create_version(
        self, folder: Path, metadata: Mapping[str, Any], before: int
    ) -> None:
        """The version after `before`, from the files of a folder; they replace all others."""
        from kagglesdk.datasets.types.dataset_api_service import (
            ApiCreateDatasetVersionRequest,
            ApiCreateDatasetVersionRequestBody,
        )

        ref = metadata["id"]
        owner, slug = ref.split("/")
        body = _filled(
            ApiCreateDatasetVersionRequestBody(),
            **_described(metadata),
            version_notes="published by landmark-kit",
            files=self._upload(ref, folder),
        )
        request = _filled(
            ApiCreateDatasetVersionRequest(),
            **{"owner_slug": owner, "dataset_slug": slug, "body": body},
        )
        self._made(
            self._call(
                f"dataset {ref}: new version",
                "datasets.dataset_api_client.create_dataset_version",
                request,
                arrived=lambda: self.dataset_version(ref) > before or None,
            ),
            ref,
        )

    # kernels

    def kernel(self, ref: str) -> Kernel | None:
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        owner, slug = ref.split("/")
        request = _filled(ApiGetKernelRequest(), user_name=owner, kernel_slug=slug)
        path = "kernels.kernels_api_client.get_kernel"
        found = self._call(f"kernel {ref}", path, request, absent=(403, 404))
        if found is None:
            return None
        held = found.metadata
        datasets = [
            "/".join(it.split("/")[:2]) for it in held.dataset_data_sources or []
        ]
        sources = frozenset([*datasets, *(held.competition_data_sources or [])])
        return Kernel(held.current_version_number or 0, found.blob.source, sources)

    def push(self, ref: str, folder: Path, arrived: Callable[[], Any]) -> Any:
        """What SaveKernel answers, its `error` unread; or what `arrived` found."""
        return self._ask(
            f"kernel {ref}: push",
            lambda: self._api.kernels_push(str(folder)),
            arrived=arrived,
        )

    def kernel_status(self, ref: str, version: int) -> tuple[str, str]:
        """State, such as QUEUED or COMPLETE, and the failure message."""
        from kagglesdk.kernels.types.kernels_api_service import (
            ApiGetKernelSessionStatusRequest,
        )

        owner, slug = ref.split("/")
        request = _filled(
            ApiGetKernelSessionStatusRequest(),
            **{"user_name": owner, "kernel_slug": slug, "version_label": f"v{version}"},
        )
        path = "kernels.kernels_api_client.get_kernel_session_status"
        answer = self._call(f"kernel {ref}: status", path, request)
        return answer.status.name, answer.failure_message or ""

    def kernel_output(self, ref: str, version: int) -> tuple[dict[str, str], str]:
        """URL of every output file by name, and the log as plain text."""
        from kagglesdk.kernels.types.kernels_api_service import (
            ApiListKernelSessionOutputRequest,
        )

        owner, slug = ref.split("/")
        urls, log, token = {}, "", ""
        while True:
            request = _filled(
                ApiListKernelSessionOutputRequest(),
                **{"user_name": owner, "kernel_slug": slug, "page_token": token},
                **{"page_size": 200, "version_label": f"v{version}"},
            )
            path = "kernels.kernels_api_client.list_kernel_session_output"
            answer = self._call(f"kernel {ref}: output", path, request)
            urls |= {it.file_name: it.url for it in answer.files or []}
            log, token = log or answer.log or "", answer.next_page_token
            if not token:
                return urls, _plain_log(log)

    def fetch(self, url: str, path: Path) -> Path:
        """Downloads an output file; whole or not at all."""

        def download() -> Path:
            with files.replacing(path) as part, urllib.request.urlopen(url) as answer:
                with part.open("wb") as out:
                    while chunk := answer.read(CHUNK):
                        out.write(chunk)
            return path

        return self._ask(f"output {path.name}", download)

    # competitions

    def submissions(self, competition: str) -> dict[str, int]:
        """Reference number of the newest submissions, by description."""
        found = self._ask(
            f"competition {competition}: submissions",
            lambda: self._api.competition_submissions(competition, page_size=100),
        )
        return {it.description: it.ref for it in reversed(found or [])}

    def submit(
        self, competition: str, ref: str, version: int, file: str, message: str
    ) -> int:
        """Enters a kernel version's file; its reference number."""
        answer = self._ask(
            f"competition {competition}: submit",
            lambda: self._api.competition_submit_code(
                file, message, competition, ref, version, quiet=True
            ),
            arrived=lambda: self.submissions(competition).get(message),
        )
        if isinstance(answer, int):
            return answer
        number = answer.ref or self.submissions(competition).get(message)
        if not number:
            raise self._error(f"competition {competition}: submit", answer.message)
        return number

    def submission(self, number: int) -> Any:
        """State, scores and error of a submission, as the client gives them."""
        from kagglesdk.competitions.types.competition_api_service import (
            ApiGetSubmissionRequest,
        )

        request = _filled(ApiGetSubmissionRequest(), ref=number)
        path = "competitions.competition_api_client.get_submission"
        return self._call(f"submission {number}", path, request)

    # how calls are made

    def _sign_in(self) -> Any:
        with self._quiet():
            try:
                from kaggle.api.kaggle_api_extended import KaggleApi

                api = KaggleApi()
            except ImportError as error:
                raise KaggleError(f"no kaggle client ({error}); pip install kaggle six")
        try:
            self._ask("signing in", api.authenticate)
        except SystemExit:
            raise KaggleError(
                "no Kaggle credentials; set KAGGLE_USERNAME and KAGGLE_KEY, or put "
                "kaggle.json in ~/.kaggle"
            ) from None
        return api

    def _upload(self, ref: str, folder: Path) -> list[Any]:
        doing = f"dataset {ref}: upload"

        def send(once: Callable[[], None]) -> None:
            self._ask(doing, once, tries=3)  # the client itself repeats what it can

        try:
            return uploads.upload(self._api, folder, send, self.say)
        except uploads.Incomplete as error:
            raise KaggleError(f"{doing}: {error}") from None

    def _made(self, answer: Any, ref: str) -> None:
        """Refuses an answer that says, with status 200, that nothing was made."""
        error = getattr(answer, "error", None)
        if error or getattr(answer, "status", "ok") == "error":
            raise self._error(f"dataset {ref}", error or "Kaggle made nothing")

    def _call(self, doing: str, path: str, request: Any, **how: Any) -> Any:
        """Sends a request to `path`, a service and method of the client."""

        def send() -> Any:
            with self._api.build_kaggle_client() as kaggle:
                method: Any = kaggle
                for name in path.split("."):
                    method = getattr(method, name)
                return method(request)

        return self._ask(doing, send, **how)

    def _ask(
        self,
        doing: str,
        send: Callable[[], Answer],
        *,
        tries: int = TRIES,
        absent: tuple[int, ...] = (),
        arrived: Callable[[], Any] | None = None,
    ) -> Any:
        """What `send` returns; too many requests, a server's error, a lost line are repeated.

        absent: HTTP codes that are no error but None. arrived: asked before a repeat for what
        the last try may have done although its answer was lost; None when it did not.
        """
        from requests.exceptions import RequestException

        wait = FIRST_WAIT
        for last in [False] * (tries - 1) + [True]:
            try:
                with self._quiet():
                    return send()
            except (RequestException, urllib.error.URLError) as error:
                status, after, text = _read_error(error)
                if status in absent:
                    return None
                if last or not (status is None or status == 429 or status >= 500):
                    raise self._error(doing, text, status) from None
            self.clock.sleep(after if after is not None else wait)
            wait *= 2
            if arrived is not None and (found := arrived()) is not None:
                return found
        raise AssertionError("unreachable")

    def _error(self, doing: str, text: str, status: int | None = None) -> KaggleError:
        words = " ".join(self.redact(str(text)).split())[:300]
        code = f"{status}: " if status else ""
        hint = f" ({HINTS[status]})" if status in HINTS else ""
        return KaggleError(f"{doing}: {code}{words}{hint}")

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps what the client prints: it may repeat what a server echoed."""
        screen, self._screen = self._screen, self._screen or sys.stdout
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            self._screen = screen


def _read_error(error: Exception) -> tuple[int | None, float | None, str]:
    """HTTP status (None: the line was lost), seconds the server asks to wait, its message."""
    response = getattr(error, "response", None)
    if isinstance(error, urllib.error.HTTPError):
        status, headers, text = error.code, error.headers, str(error.reason)
    elif response is not None:
        status, headers, text = response.status_code, response.headers, str(error)
        if status < 400:  # an error that came as a good answer
            status = int(response.json().get("code", 500))
    else:
        return None, None, f"no answer ({type(error).__name__})"
    try:
        return status, max(0.0, float(headers.get("Retry-After"))), text
    except (TypeError, ValueError):
        return status, None, text


def _filled(request: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def _described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "subtitle": metadata.get("subtitle"),
        "description": metadata.get("description"),
        "category_ids": metadata.get("keywords", []),
    }


def _plain_log(log: str) -> str:
    """Kaggle's log, a JSON list of {stream_name, time, data}, as text."""
    try:
        return "".join(str(event["data"]) for event in json.loads(log))
    except (ValueError, TypeError, KeyError):
        return log
