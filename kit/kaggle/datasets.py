"""A build's datasets on Kaggle: sent when the server's differ, waited for, and verified.

What is there is learnt by asking: names and sizes from Kaggle's list of files, hashes from the
`parts.json` that travels in every dataset.
"""

from pathlib import Path

from kit import files
from kit.kaggle import manifest
from kit.kaggle.client import KaggleError
from kit.kaggle.server import Server


def bring(server: Server, build: Path, send: bool) -> dict[str, int]:
    """The version of every dataset of the build, by owner/slug.

    All are sent before the first is waited for. Without `send` they must be there already.
    """
    versions: dict[str, int] = {}
    sent: dict[str, Path] = {}
    for folder in manifest.datasets(build):
        ref = files.read_json(folder / manifest.DATASET)["id"]
        version, same = _present(server, ref, folder)
        versions[ref] = version
        if same:
            server.say(f"dataset {ref}: version {version} has these parts already")
            continue
        if not send:
            state = "differs from the build" if version else "is not on Kaggle"
            raise KaggleError(f"dataset {ref}: {state}; publish with --datasets")
        _send(server, folder, version)
        sent[ref] = folder
    for ref, folder in sent.items():
        version = _wait(server, ref, versions[ref])
        if wrong := _differences(server, ref, version, folder):
            raise KaggleError(f"dataset {ref} version {version}: {'; '.join(wrong)}")
        server.say(f"dataset {ref}: version {version} is ready, every part verified")
        versions[ref] = version
    return versions


def _present(server: Server, ref: str, folder: Path) -> tuple[int, bool]:
    """The newest version on the server, 0 if none, and whether it is the folder's."""
    status = server.dataset_status(ref)
    if status is None:
        return 0, False
    if status == "deleted":
        raise KaggleError(f"dataset {ref}: was deleted on Kaggle; choose another slug")
    version = _wait(server, ref, 0, ("ready", "failed"))
    if server.dataset_status(ref) == "failed":
        return version, False
    if _differences(server, ref, version, folder):
        return version, False
    held = server.dataset_file(ref, version, manifest.PARTS)
    return version, held == (folder / manifest.PARTS).read_bytes()


def _send(server: Server, folder: Path, before: int) -> None:
    metadata = files.read_json(folder / manifest.DATASET)
    parts = manifest.read_parts(folder / manifest.PARTS)
    size = sum(part.size for part in parts) / 1e6
    server.say(f"dataset {metadata['id']}: sending {len(parts)} parts, {size:.1f} MB")
    if before:
        server.create_version(folder, metadata, before)
    else:
        server.create_dataset(folder, metadata)


def _wait(
    server: Server, ref: str, before: int, ends: tuple[str, ...] = ("ready",)
) -> int:
    """Waits until a version after `before` is in one of the states `ends`; its number."""

    def look() -> int | None:
        status, version = server.dataset_status(ref), server.dataset_version(ref)
        if version <= before:
            return None
        if status == "failed" and status not in ends:
            words = f"Kaggle could not process version {version}"
            raise KaggleError(f"dataset {ref}: {words}")
        return version if status in ends else None

    return server.poll(f"dataset {ref}", look)


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
