"""A work folder's files <-> Kaggle's flat datasets: paths as names, and links back from mounts.

features/toy/c2x/index_train/ids.npy travels as features__toy__c2x__index_train__ids.npy.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from kit import checksums, files
from kit.kaggle import manifest

SEPARATOR = "__"
WHEEL = ".whl"  # is installed or imported, and belongs to no work folder


def name(path: PurePath) -> str:
    """The flat name of a file; path: relative to the work folder."""
    flat = SEPARATOR.join(path.parts)
    if path.is_absolute() or ".." in path.parts or _parts(flat) != path.parts:
        raise ValueError(
            f"{path} cannot travel in a flat folder: a part of it is no plain name, "
            f"holds {SEPARATOR!r}, or ends with an underscore; rename it"
        )
    return flat


def path(name: str) -> Path:
    """Where the file of this flat name lies in a work folder."""
    parts = _parts(name)
    if "/" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not the flat name of a file")
    return Path(*parts)


def link(mounts: Sequence[Path], work: Path) -> None:
    """Links every part of every mounted dataset to its place in `work`, but for wheels.

    Nothing is linked before all mounts are what their parts.json says, in names and sizes.
    Links of an earlier call are kept or replaced; a file of `work` itself is not.
    """
    found: dict[Path, Path] = {}
    for mount in mounts:
        for source in _checked(mount):
            target = work / path(source.name)
            if target in found:
                other = found[target].parent
                raise ValueError(f"{source.name} is in {other} and in {mount}")
            found[target] = source
    for target in found:
        if target.exists() and not target.is_symlink():
            raise FileExistsError(f"{target} is there already, and is no link")
    for target, source in found.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.absolute())


def carry(path: Path, to: Path) -> None:
    """A file into the build: JSON without this machine's paths, the rest as it is."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.unlink(missing_ok=True)
    if path.suffix == ".json":
        value = _portable(files.read_json(path))
        sealed = isinstance(value, dict) and checksums.SEAL in value
        (checksums.write_manifest if sealed else files.write_json)(to, value)
        return
    try:
        os.link(path.resolve(), to)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, to)


def _portable(value: Any) -> Any:
    """Absolute paths become their last part."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, list):
        return [_portable(each) for each in value]
    if isinstance(value, dict):
        return {_portable(name): _portable(each) for name, each in value.items()}
    return value


def _checked(mount: Path) -> list[Path]:
    """The files to link."""
    say = f"{mount}: wrong manifest"
    try:
        parts = manifest.read_parts(mount / manifest.PARTS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{say}: {error}") from None
    for part in parts:
        file = mount / part.path
        if not file.is_file():
            raise ValueError(f"{say}: {part.path} is missing")
        size = file.stat().st_size
        if size != part.size:
            raise ValueError(f"{say}: {part.path} has {size} bytes, not {part.size}")
    return [mount / part.path for part in parts if not part.path.endswith(WHEEL)]


def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.split(SEPARATOR))
