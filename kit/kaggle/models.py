"""A build's networks on Kaggle: a model with a variation each, sent when the server's differ.

As with datasets, what is there is learnt by asking: names and sizes from Kaggle's list of files,
hashes from the `parts.json` that travels in every variation.
"""

from pathlib import Path

from kit import files
from kit.kaggle import manifest
from kit.kaggle.client import KaggleError
from kit.kaggle.server import Server


def bring(server: Server, build: Path) -> dict[str, int]:
    """The version of every variation of the build, by owner/model/framework/variation."""
    folders = manifest.variations(build)
    if not folders:
        raise KaggleError(f"no {build / manifest.MODEL}; build again with the models")
    metadata = files.read_json(build / manifest.MODEL / manifest.MODEL_METADATA)
    ref = f"{metadata['ownerSlug']}/{metadata['slug']}"
    if not server.has_model(ref):
        server.say(f"model {ref}: making it")
        server.create_model(metadata)
    versions, sent = {}, {}
    for folder in folders:
        about = files.read_json(folder / manifest.VARIATION)
        name = f"{ref}/{about['framework']}/{about['instanceSlug']}"
        versions[name] = before = server.variation(name)
        if before and _same(server, name, before, folder):
            server.say(f"model {name}: version {before} has these parts already")
            continue
        size = sum(each.stat().st_size for each in _parts(folder)) / 1e6
        server.say(f"model {name}: sending {size:.1f} MB")
        if before:
            server.create_variation_version(name, folder, before)
        else:
            server.create_variation(name, folder, about)
        sent[name] = folder
    for name, folder in sent.items():
        versions[name] = version = _wait(server, name, versions[name])
        if wrong := _differences(server, name, version, folder):
            raise KaggleError(f"model {name} version {version}: {'; '.join(wrong)}")
        server.say(f"model {name}: version {version} is there, every part verified")
    return versions


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != manifest.VARIATION)


def _same(server: Server, name: str, version: int, folder: Path) -> bool:
    if _differences(server, name, version, folder):
        return False
    held = server.variation_file(name, version, manifest.PARTS)
    return held == (folder / manifest.PARTS).read_bytes()


def _wait(server: Server, name: str, before: int) -> int:
    def look() -> int | None:
        version = server.variation(name)
        return version if version > before else None

    return server.poll(f"model {name}", look)


def _differences(server: Server, name: str, version: int, folder: Path) -> list[str]:
    """How the server's names and sizes differ from the folder's."""
    there = server.variation_files(name, version)
    wanted = {path.name: path.stat().st_size for path in _parts(folder)}
    return [
        f"{each} has {there.get(each, 0)} bytes, not {wanted.get(each, 0)}"
        for each in sorted(there.keys() | wanted.keys())
        if there.get(each) != wanted.get(each)
    ]
