"""A build -> datasets, a kernel that ran, a submission with its score.

Nothing here is remembered between two runs: each step first asks the server what is there, so
the same command goes on where the last one stopped and pushes nothing twice.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kit import files
from kit.kaggle import check, manifest
from kit.kaggle.client import Clock, KaggleError
from kit.kaggle.server import Kernel, Server

POLL = (2.0, 60.0)  # seconds between two looks: the first, the longest
GROWTH = 1.5
LIMIT = (
    36 * 3600.0
)  # seconds to wait for one thing; a kernel may queue long, then run 12 h
BUSY = "Maximum batch GPU session count"
BUSY_WAIT, BUSY_LIMIT = (30.0, 600.0), 13 * 3600.0  # a session ends after 12 h
LOG_LINES = 20  # shown of the log of a kernel that failed
MARK = "landmark_kit"  # key of the fingerprint in a pushed notebook's metadata
RESULT = "submission.csv"


@dataclass(frozen=True)
class Published:
    """What is on Kaggle now."""

    datasets: dict[str, int] = field(default_factory=dict)  # version by owner/slug
    kernel: str = ""  # owner/slug/version
    outputs: tuple[Path, ...] = ()
    public_score: str = ""
    private_score: str = ""


def publish(
    build: Path,
    output: Path,
    *,
    datasets: bool = False,
    kernel: bool = False,
    submit: str = "",
    again: bool = False,
    clock: Clock | None = None,
    say: Callable[[str], None] = print,
) -> Published:
    """Brings a build to Kaggle as far as asked, and its kernel's output to `output`.

    datasets: send those that differ from the server's; without it they must not differ.
    kernel: push it and wait for its end. submit: the message of a competition entry, which
    needs the kernel. again: push the kernel although the same one is there.
    Raises ValueError for a build that Kaggle would refuse, KaggleError for all else.
    """
    check.refuse(build)
    server = Server(clock or Clock(), say)
    versions = {}
    for folder in manifest.datasets(build):
        metadata = files.read_json(folder / manifest.DATASET)
        versions[metadata["id"]] = _dataset(server, folder, metadata, datasets)
    if not (kernel or submit):
        return Published(versions)
    ref, version = _push(server, build, versions, again)
    _run(server, ref, version)
    outputs = _fetch(server, ref, version, output)
    done = Published(versions, f"{ref}/{version}", outputs)
    if not submit:
        return done
    if output / RESULT not in outputs:
        raise KaggleError(f"kernel {ref}: wrote no {RESULT}, so nothing was submitted")
    competition = manifest.read(build).competition
    scores = _submit(server, competition, ref, version, submit)
    return Published(versions, done.kernel, outputs, *scores)


def plan(build: Path) -> str:
    """What would be sent; asks nobody. Refuses what `publish` would."""
    check.refuse(build)
    lines = [manifest.table(build), ""]
    for folder in manifest.datasets(build):
        ref = files.read_json(folder / manifest.DATASET)["id"]
        lines.append(f"dataset {ref}: sent unless the server has these parts")
    kernel = files.read_json(build / manifest.SUBMISSION / manifest.KERNEL)
    shape = kernel.get("machine_shape") or "no accelerator"
    internet = "with" if kernel["enable_internet"] else "without"
    lines.append(f"kernel {kernel['id']}: on {shape}, {internet} internet")
    lines.append(f"competition {manifest.read(build).competition}")
    return "\n".join(lines)


def _dataset(
    server: Server, folder: Path, metadata: Mapping[str, Any], send: bool
) -> int:
    """The dataset's version whose files are those of the folder, sent first if need be."""
    ref = metadata["id"]
    there = server.dataset_status(ref)
    version = 0
    if there == "deleted":
        raise KaggleError(f"dataset {ref}: was deleted on Kaggle; choose another slug")
    if there is not None:
        version = _wait_dataset(server, ref, 0, ("ready", "failed"))
        ready = server.dataset_status(ref) == "ready"
        if ready and _same(server, ref, version, folder):
            server.say(f"dataset {ref}: version {version} has these parts already")
            return version
    if not send:
        state = "is not on Kaggle" if there is None else "differs from the build"
        raise KaggleError(f"dataset {ref}: {state}; publish with --datasets")
    parts = manifest.read_parts(folder / manifest.PARTS)
    size = sum(part.size for part in parts) / 1e6
    server.say(f"dataset {ref}: sending {len(parts)} parts, {size:.1f} MB")
    if there is None:
        server.create_dataset(folder, metadata)
    else:
        server.create_version(folder, metadata, version)
    version = _wait_dataset(server, ref, version)
    if wrong := _differences(server, ref, version, folder):
        raise KaggleError(f"dataset {ref} version {version}: {'; '.join(wrong)}")
    server.say(
        f"dataset {ref}: version {version} is ready, {len(parts)} parts verified"
    )
    return version


def _wait_dataset(
    server: Server, ref: str, before: int, ends: tuple[str, ...] = ("ready",)
) -> int:
    """Waits until a version after `before` is in one of the states `ends`; its number."""

    def look() -> int | None:
        status, version = server.dataset_status(ref), server.dataset_version(ref)
        if version <= before:
            return None
        if status == "failed" and status not in ends:
            raise KaggleError(
                f"dataset {ref}: Kaggle could not process version {version}"
            )
        return version if status in ends else None

    return _poll(server, f"dataset {ref}", look)


def _same(server: Server, ref: str, version: int, folder: Path) -> bool:
    """Whether a version has the folder's files, by its own list of their hashes."""
    if _differences(server, ref, version, folder):
        return False
    held = server.dataset_file(ref, version, manifest.PARTS)
    return held == (folder / manifest.PARTS).read_bytes()


def _differences(server: Server, ref: str, version: int, folder: Path) -> list[str]:
    """How the server's names and sizes differ from the folder's."""
    there = server.dataset_files(ref, version)
    wanted = {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.name != manifest.DATASET
    }
    found = [f"{name} is missing" for name in wanted if name not in there]
    found += [f"{name} is not of this build" for name in there if name not in wanted]
    for name, size in wanted.items():
        if name in there and there[name] != size:
            found.append(f"{name} has {there[name]} bytes, not {size}")
    return found


def _push(
    server: Server, build: Path, versions: Mapping[str, int], again: bool
) -> tuple[str, int]:
    """Pushes the kernel unless it is there; its name and version."""
    folder = build / manifest.SUBMISSION
    metadata = _pinned(files.read_json(folder / manifest.KERNEL), versions)
    ref = metadata["id"]
    with TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        files.write_json(Path(copy, manifest.KERNEL), metadata)
        code = Path(copy, metadata["code_file"])
        mark = files.fingerprint([metadata, files.sha256(code)])
        _stamp(code, mark)
        before = server.kernel(ref)
        if before and not again and _is(before, mark, code, metadata):
            server.say(f"kernel {ref}: version {before.version} is this one already")
            return ref, before.version
        known = before.version if before else 0

        def arrived() -> int | None:
            now = server.kernel(ref)
            new = now and now.version > known and _is(now, mark, code, metadata)
            return now.version if now and new else None

        version = _save(server, ref, Path(copy), arrived)
    server.say(f"kernel {ref}: pushed as version {version}")
    return ref, version


def _save(
    server: Server, ref: str, folder: Path, arrived: Callable[[], int | None]
) -> int:
    """Pushes, waiting while all GPU sessions are taken; reads every field of the answer."""
    start, wait = server.clock.now(), BUSY_WAIT[0]
    while True:
        answer = server.push(ref, folder, arrived)
        if isinstance(answer, int):
            return answer
        if not answer.error:
            break
        waited = server.clock.now() - start
        if BUSY not in answer.error or waited + wait > BUSY_LIMIT:
            raise KaggleError(server.redact(f"kernel {ref}: {answer.error}"))
        server.say(f"kernel {ref}: {answer.error}; trying again in {wait:.0f} s")
        server.clock.sleep(wait)
        wait = min(wait * 2, BUSY_WAIT[1])
    for kind in ("dataset", "competition", "kernel", "model"):
        if refused := getattr(answer, f"invalid_{kind}_sources"):
            names = ", ".join(map(str, refused))
            raise KaggleError(f"kernel {ref}: Kaggle did not attach {kind} {names}")
    if not answer.version_number:
        raise KaggleError(f"kernel {ref}: Kaggle named no version of what was pushed")
    return answer.version_number


def _pinned(metadata: dict[str, Any], versions: Mapping[str, int]) -> dict[str, Any]:
    """The kernel's metadata with this build's datasets at their versions."""
    pinned = []
    for source in metadata.get("dataset_sources", []):
        ref = "/".join(source.split("/")[:2])
        pinned.append(f"{ref}/{versions[ref]}" if ref in versions else source)
    return metadata | {"dataset_sources": pinned}


def _stamp(notebook: Path, mark: str) -> None:
    """Writes a fingerprint where it travels with the notebook and runs nothing."""
    content = files.read_json(notebook)
    content["metadata"] = content.get("metadata", {}) | {MARK: mark}
    files.write_json(notebook, content)


def _is(held: Kernel, mark: str, notebook: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the server's kernel is this one: the mark, the cells, and the sources attached."""
    try:
        there = json.loads(held.source)
        marked = there["metadata"].get(MARK) == mark
        sent = json.loads(check.sent_source(notebook))
        same = [it["source"] for it in there["cells"]] == [
            it["source"] for it in sent["cells"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    wanted = {"/".join(it.split("/")[:2]) for it in metadata["dataset_sources"]}
    wanted |= set(metadata.get("competition_sources", []))
    return marked and same and held.sources >= wanted


def _run(server: Server, ref: str, version: int) -> None:
    """Waits for the kernel's end; shows the end of the log if that is an error."""
    seen: list[str] = []

    def look() -> tuple[str, str] | None:
        state, message = server.kernel_status(ref, version)
        if state not in seen:
            seen.append(state)
            server.say(f"kernel {ref}: version {version} is {_words(state)}")
        over = state in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
        return (state, message) if over else None

    state, message = _poll(server, f"kernel {ref}", look)
    if state == "COMPLETE":
        return
    _, log = server.kernel_output(ref, version)
    lines = [line for line in log.splitlines() if line.strip()]
    for line in lines[-LOG_LINES:]:
        server.say(f"  {line}")
    cause = message or (lines[-1] if lines else "no message and no log")
    end = "ended in error" if state == "ERROR" else "was cancelled"
    say = f"kernel {ref}: version {version} {end}: {cause}"
    raise KaggleError(" ".join(server.redact(say).split()))


def _fetch(server: Server, ref: str, version: int, output: Path) -> tuple[Path, ...]:
    """The kernel's output files, and its log, on this machine."""
    urls, log = server.kernel_output(ref, version)
    paths = []
    for name, url in urls.items():
        path = output / name
        if not path.resolve().is_relative_to(output.resolve()):
            raise KaggleError(f"kernel {ref}: output {name!r} would leave {output}")
        paths.append(server.fetch(url, path))
    text = server.redact(log)
    paths.append(files.write_text(output / f"{ref.partition('/')[2]}.log", text))
    server.say(f"kernel {ref}: {len(paths)} files in {output}")
    return tuple(paths)


def _submit(
    server: Server, competition: str, ref: str, version: int, message: str
) -> tuple[str, str]:
    """Enters the kernel's version once, and waits for its scores: public, private."""
    message = f"{message} (version {version})"  # by which a second run knows it
    number = server.submissions(competition).get(message)
    if number:
        server.say(f"competition {competition}: {message!r} was submitted already")
    else:
        number = server.submit(competition, ref, version, RESULT, message)
        server.say(f"competition {competition}: submitted {message!r}")

    def look() -> Any:
        found = server.submission(number)
        return None if found.status.name == "PENDING" else found

    found = _poll(server, f"submission {number}", look)
    if found.status.name == "ERROR":
        cause = server.redact(found.error_description or "no message")
        raise KaggleError(f"competition {competition}: {message!r} failed: {cause}")
    scores = found.public_score or "", found.private_score or ""
    server.say(
        f"score: public {scores[0] or 'hidden'}, private {scores[1] or 'hidden'}"
    )
    return scores


def _poll(server: Server, what: str, look: Callable[[], Any]) -> Any:
    """The first answer of `look` that is not None."""
    start, wait = server.clock.now(), POLL[0]
    while (found := look()) is None:
        if server.clock.now() - start > LIMIT:
            hours = LIMIT / 3600
            raise KaggleError(
                f"{what}: not finished after {hours:.0f} h; run this again"
            )
        server.clock.sleep(wait)
        wait = min(wait * GROWTH, POLL[1])
    return found


def _words(state: str) -> str:
    return state.lower().replace("_", " ")
