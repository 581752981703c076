"""A build -> what Kaggle or its client would refuse or drop later, one line each.

The client answers several of these only after everything is uploaded, or not at all.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import files
from kit.kaggle import manifest

SLUG = range(6, 51)  # letters of a dataset's slug and of its title
KERNEL_TITLE = range(5, 51)
SUBTITLE = range(20, 81)
SOURCE_BYTES = 1_000_000  # of a kernel, as it is sent
PRIVATE_BYTES = 100_000_000_000  # of all private datasets of an account
DATASET_FILES = 1000
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z")
MACHINES = (
    *("NvidiaTeslaT4", "NvidiaL4", "NvidiaL4X1"),
    *("NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000"),
)
RETIRED = "NvidiaTeslaP100"  # Kaggle's torch has no kernels for it
LEFT_OUT = {  # what the client never uploads
    *("datapackage.json", "kernel-metadata.json", "model-metadata.json"),
    "model-instance-metadata.json",
    *(f"dataset-cover-image{end}" for end in (".png", ".jpg", ".jpeg", ".webp")),
}
FIELDS = {
    manifest.DATASET: (
        *("id", "title", "licenses", "subtitle", "description", "keywords"),
    ),
    manifest.MODEL_METADATA: (
        *("ownerSlug", "slug", "title", "subtitle", "isPrivate", "description"),
    ),
    manifest.VARIATION: (
        *("ownerSlug", "modelSlug", "instanceSlug", "framework", "overview", "usage"),
        *("licenseName", "fineTunable", "trainingData"),
    ),
    manifest.KERNEL: (
        *("id", "title", "code_file", "language", "kernel_type", "is_private"),
        *("enable_gpu", "enable_tpu", "enable_internet", "machine_shape", "keywords"),
        *("dataset_sources", "competition_sources", "kernel_sources", "model_sources"),
        *("docker_image", "docker_image_pinning_type"),
    ),
}
ID = re.compile(r"[a-z0-9][a-z0-9_-]*/[a-z0-9]+(-[a-z0-9]+)*")


def refuse(build: Path) -> None:
    """Raises ValueError with every problem, a line each."""
    if found := problems(build):
        raise ValueError("\n".join(found))


def problems(build: Path) -> list[str]:
    """What is wrong with a build, folder by folder; none when it may be published."""
    try:
        made = manifest.read(build)
        folders = manifest.datasets(build)
    except (OSError, ValueError) as error:
        return [str(error)]
    found, refs = [], []
    for folder in folders:
        metadata, lines = _metadata(folder / manifest.DATASET)
        found += lines
        if metadata is not None:
            refs.append(str(metadata.get("id")))
            found += [f"{folder.name}: {it}" for it in _dataset(metadata)]
        found += [f"{folder.name}: {it}" for it in _folder(folder)]
    found += [f"{ref}: two folders are this dataset" for ref in _twice(refs)]
    metadata, lines = _metadata(build / manifest.SUBMISSION / manifest.KERNEL)
    found += lines
    if metadata is not None:
        say = f"{manifest.SUBMISSION}: "
        found += [say + it for it in _kernel(metadata)]
        found += [say + it for it in _sources(metadata, refs, made.competition)]
        found += [say + it for it in _code(build / manifest.SUBMISSION, metadata)]
    return found + _models(build) + _files(build, made.parts)


def sent_source(notebook: Path) -> str:
    """The text of a notebook as the client sends it: without outputs, cells as strings."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
        cell["source"] = "".join(cell["source"])
    return json.dumps(content)


def _metadata(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The metadata, if it can be read, and what is wrong with it as a file."""
    say = f"{path.parent.name}: {path.name}"
    if not path.is_file():
        return None, [f"{say} is missing"]
    try:
        metadata = files.read_json(path)
    except ValueError:
        return None, [f"{say} is not JSON"]
    if not isinstance(metadata, dict):
        return None, [f"{say} is not an object"]
    known, found = FIELDS[path.name], []
    for name in sorted(set(metadata) - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (close: {close[0]})" if close else ""
        found.append(f"{say}: unknown field {name!r}{hint}")
    return metadata, found


def _dataset(metadata: Mapping[str, Any]) -> list[str]:
    title, subtitle = metadata.get("title"), metadata.get("subtitle")
    found = _id(metadata, SLUG)
    found += _length("title", title, SLUG)
    found += _length("subtitle", subtitle, SUBTITLE) if subtitle else []
    licences = metadata.get("licenses")
    one = isinstance(licences, list) and len(licences) == 1
    if not one or not isinstance(licences[0], dict) or not licences[0].get("name"):
        found.append('licenses must be exactly one, such as [{"name": "CC0-1.0"}]')
    return found


def _models(build: Path) -> list[str]:
    """What is wrong with the build's model, if it has one."""
    folders = manifest.variations(build)
    if not folders:
        return []
    metadata, found = _metadata(build / manifest.MODEL / manifest.MODEL_METADATA)
    ref = _ref(metadata or {}, "slug")
    if metadata is not None:
        lines = _id({"id": ref}, SLUG) + _length("title", metadata.get("title"), SLUG)
        found += [f"{manifest.MODEL}: {it}" for it in lines]
    for folder in folders:
        about, lines = _metadata(folder / manifest.VARIATION)
        lines = lines + _folder(folder, manifest.VARIATION)
        lines += [] if about is None else _variation(about, folder.name, ref)
        found += [f"{manifest.MODEL}/{folder.name}: {it}" for it in lines]
    return found


def _variation(metadata: Mapping[str, Any], folder: str, ref: str) -> list[str]:
    found, slug = [], metadata.get("instanceSlug")
    if (own := _ref(metadata, "modelSlug")) != ref:
        found.append(f"is a variation of {own}, not of {ref}")
    if slug != folder or _slug(folder) != folder:
        found.append(f"instanceSlug {slug!r} is not a slug that is its folder's name")
    if not metadata.get("licenseName"):
        found.append("licenseName must be written")
    return found


def _ref(metadata: Mapping[str, Any], slug: str) -> str:
    return f"{metadata.get('ownerSlug')}/{metadata.get(slug)}"


def _folder(folder: Path, metadata: str = manifest.DATASET) -> list[str]:
    """What the client would leave out of a dataset or variation, or Kaggle would change in it."""
    own = {manifest.PARTS, metadata}
    found, there = [], sorted(folder.iterdir())
    for path in there:
        if path.is_dir():
            found.append(f"{path.name}/ would be left out; make it its own dataset")
        elif path.name in LEFT_OUT - own:
            found.append(f"{path.name} would be left out; rename it")
        elif path.suffix.lower() in ARCHIVES:
            found.append(f"{path.name} would be unpacked; store its files instead")
        elif not path.stat().st_size:
            found.append(f"{path.name} is empty, which cannot be uploaded")
    if len(there) > DATASET_FILES:
        found.append(f"{len(there)} files, more than {DATASET_FILES}; split it")
    try:
        parts = manifest.read_parts(folder / manifest.PARTS)
    except (OSError, ValueError) as error:
        words = f"{manifest.PARTS} is missing or broken"
        return [*found, f"{words}; build again ({error})"]
    wanted = {p.name for p in there if p.is_file()} - own
    if {part.path for part in parts} != wanted:
        found.append(f"{manifest.PARTS} lists other files than there are; build again")
    return found


def _kernel(metadata: Mapping[str, Any]) -> list[str]:
    found = _id(metadata, KERNEL_TITLE)
    title = metadata.get("title")
    slug = str(metadata.get("id")).rpartition("/")[2]
    found += _length("title", title, KERNEL_TITLE)
    if isinstance(title, str) and _slug(title) != slug:
        found.append(f"title {title!r} makes the slug {_slug(title)}, not {slug}")
    for name, value in {"language": "python", "kernel_type": "notebook"}.items():
        if metadata.get(name) != value:
            found.append(f"{name} is {metadata.get(name)!r}, not {value}")
    for name in ("is_private", "enable_gpu", "enable_internet"):
        if not isinstance(metadata.get(name), bool):
            found.append(f"{name} must be written, as true or false")
    if metadata.get("competition_sources") and metadata.get("enable_internet") is True:
        found.append("enable_internet must be false: code competitions refuse it")
    shape = metadata.get("machine_shape")
    if shape == RETIRED:
        found.append(f"machine_shape {RETIRED} is retired; take NvidiaTeslaT4")
    elif metadata.get("enable_gpu") is True and shape not in MACHINES:
        listed = ", ".join(MACHINES)
        found.append(f"machine_shape is {shape!r}, not one of {listed}")
    return found


def _sources(
    metadata: Mapping[str, Any], refs: Sequence[str], competition: str
) -> list[str]:
    """refs: this build's datasets, whose versions are pinned when they are known."""
    found, lists = [], {}
    for name in FIELDS[manifest.KERNEL]:
        if not name.endswith("_sources"):
            continue
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(it, str) for it in value):
            found.append(f"{name} must be a list of names")
            value = []
        lists[name] = value
    for source in lists["dataset_sources"]:
        if source not in refs and not re.fullmatch(rf"{ID.pattern}/[1-9]\d*", source):
            found.append(f"dataset {source} must name its version: owner/slug/3")
    for ref in refs:
        if all(
            source != ref and not source.startswith(f"{ref}/")
            for source in lists["dataset_sources"]
        ):
            found.append(f"dataset_sources lacks {ref}, a dataset of this build")
    for source in lists["model_sources"]:
        if not re.fullmatch(r"[^/]+(/[^/]+){3}/[1-9]\d*", source):
            wanted = "owner/model/framework/variation/3"
            found.append(f"model {source} must name its version: {wanted}")
    for source in lists["kernel_sources"]:
        if not ID.fullmatch(source):
            found.append(f"kernel {source} is not owner/slug")
    if competition and competition not in lists["competition_sources"]:
        found.append(f"competition_sources lacks {competition}")
    return found


def _code(folder: Path, metadata: Mapping[str, Any]) -> list[str]:
    name = metadata.get("code_file")
    if not isinstance(name, str) or not name or Path(name).name != name:
        return [f"code_file is {name!r}, not a file of this folder"]
    if not (folder / name).is_file():
        return [f"code_file {name} is missing"]
    try:
        size = len(sent_source(folder / name).encode())
    except (ValueError, KeyError, TypeError):
        return [f"{name} is not a notebook"]
    if size >= SOURCE_BYTES:
        return [f"{name} is {size} bytes as sent, not under {SOURCE_BYTES}"]
    return []


def _files(build: Path, parts: Sequence[manifest.Part]) -> list[str]:
    """How the build's files differ from its manifest; and their size in all."""
    found = []
    there = {p.relative_to(build).as_posix() for p in build.rglob("*") if p.is_file()}
    listed = {part.path for part in parts}
    for path in sorted(there - listed - {manifest.MANIFEST}):
        found.append(f"{path} is not in {manifest.MANIFEST}; build again")
    for part in parts:
        if part.path not in there:
            found.append(f"{part.path} is missing; build again")
        elif files.sha256(build / part.path) != part.sha256:
            found.append(f"{part.path} has changed since the build; build again")
    beside = f"{manifest.MODEL}/"  # models have an account of their own
    total = sum(part.size for part in parts if not part.path.startswith(beside))
    if total > PRIVATE_BYTES:
        gigabytes = f"{total / 1e9:.1f} GB, more than the {PRIVATE_BYTES / 1e9:.0f} GB"
        found.append(f"the build is {gigabytes} of private data an account may hold")
    return found


def _id(metadata: Mapping[str, Any], length: range) -> list[str]:
    ref = metadata.get("id")
    if not isinstance(ref, str) or not ID.fullmatch(ref):
        return [f"id {ref!r} is not owner/slug in small letters, digits and hyphens"]
    return _length("slug", ref.partition("/")[2], length)


def _length(what: str, text: Any, allowed: range) -> list[str]:
    if isinstance(text, str) and len(text) in allowed:
        return []
    return [f"{what} {text!r} is not {allowed[0]} to {allowed[-1]} letters long"]


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
