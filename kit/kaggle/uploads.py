"""A folder -> files on Kaggle's storage, all of them or an error; what arrived is not sent again.

The client goes on without a file that failed, and a dataset is then made without it; and it
remembers an unfinished upload by path, size and second, so a file rebuilt too soon would go on
where another ended. Both are mended here, through what the client lets a caller replace.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kit import files
from kit.kaggle import manifest
from kit.kaggle.client import Client, KaggleError

ROUNDS = 3  # without anything new; the second resumes, the third begins anew


class Incomplete(RuntimeError):
    """Names the files that did not arrive."""


@contextmanager
def uploaded(
    client: Client, what: str, folder: Path, kind: str = "DATASET"
) -> Iterator[list[Any]]:
    """Yields what a request for a dataset or a model lists under `files`.

    An error inside the block leaves the uploads to the next run. kind: DATASET or MODEL.
    """
    doing = f"{what}: upload"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())

    def send(once: Callable[[], None]) -> None:
        client.ask(doing, once, size=size)

    try:
        with _uploaded(client.api, folder, send, client.say, kind) as parts:
            yield parts
    except Incomplete as error:
        raise KaggleError(f"{doing}: {error}") from None


@contextmanager
def _uploaded(
    api: Any,
    folder: Path,
    send: Callable[[Callable[[], None]], None],
    say: Callable[[str], None],
    kind: str,
) -> Iterator[list[Any]]:
    """send: makes a call of the client, repeats it when that may help, raises when not."""
    from kagglesdk.blobs.types.blob_api_service import ApiBlobType

    listed = manifest.read_parts(folder / manifest.PARTS)
    hashes = {part.path: part.sha256 for part in listed}
    hashes[manifest.PARTS] = files.sha256(folder / manifest.PARTS)
    with _context(hashes, say) as context:
        arrived: set[str] = set()
        stuck = 0  # rounds in which nothing new arrived
        while stuck < ROUNDS:
            request = _Request()

            def once(request: _Request = request) -> None:
                request.files = []
                blobs = ApiBlobType[kind]
                with suppress(ValueError):  # of a file that failed: newer clients stop
                    api.upload_files(
                        request, None, str(folder), blobs, context, quiet=True
                    )

            send(once)
            if len(request.files) == len(hashes):
                yield request.files
                return
            before = len(arrived)
            for path, sent in context.seen.items():
                if sent.upload_complete:
                    arrived.add(Path(path).name)
                elif stuck == ROUNDS - 2:
                    sent.cleanup()
            stuck = 0 if len(arrived) > before else stuck + 1
        names = ", ".join(sorted(hashes.keys() - arrived))
        raise Incomplete(f"{names} did not arrive; nothing was made of it")


class _Request:
    """What the client appends uploaded files to."""

    files: list[Any]


def _context(hashes: Mapping[str, str], say: Callable[[str], None]) -> Any:
    """The client's memory of unfinished uploads, each under the hash of its content."""
    from kaggle.api.kaggle_api_extended import ResumableUploadContext

    class Context(ResumableUploadContext):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, Any] = {}  # the newest upload of each path

        def get_upload_info_file_path(self, path: str) -> str:
            mark = hashes[Path(path).name][:16]
            return super().get_upload_info_file_path(f"{path}.{mark}")

        def new_resumable_file_upload(self, path: str, request: Any) -> Any:
            if path not in self.seen:
                say(f"  {Path(path).name}, {request.content_length / 1e6:.1f} MB")
            self.seen[path] = super().new_resumable_file_upload(path, request)
            return self.seen[path]

    return Context()
