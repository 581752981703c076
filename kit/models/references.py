"""A reference to a saved network -> its folder, among what is on this machine; nothing is fetched.

A path, kaggle:<owner>/<model>/<framework>/<variation>/<version> or hf:<owner>/<name>, also with
@<revision>. The folder has model.safetensors and model.json.
"""

import os
from pathlib import Path

FILES = ("model.safetensors", "model.json")
KAGGLE, HUGGING_FACE = "kaggle:", "hf:"


def folder(reference: Path | str) -> Path:
    """Where the network lies; refuses one that is not here and says what fetches it."""
    text = str(reference)
    if text.startswith(KAGGLE):
        name = text.removeprefix(KAGGLE)
        parts = _parts(text, name, 5)
        places = mounts(*parts)
        command = f"kaggle models variations versions download {name} --untar -p FOLDER"
        then = ", then give FOLDER's path"
    elif text.startswith(HUGGING_FACE):
        name, _, revision = text.removeprefix(HUGGING_FACE).partition("@")
        owner, repository = _parts(text, name, 2)
        places = snapshots(owner, repository, revision or "main")
        command = f"hf download {name}" + (
            f" --revision {revision}" if revision else ""
        )
        then = ""
    else:
        return Path(reference)
    for place in places:
        if all((place / each).is_file() for each in FILES):
            return place
    looked = " and ".join(map(str, places))
    raise FileNotFoundError(
        f"{text} is not on this machine (looked in {looked}); where there is a network, run: "
        f"{command}{then}"
    )


def mounts(
    owner: str, model: str, framework: str, variation: str, version: str
) -> list[Path]:
    """Where Kaggle may mount a model's version, the place that counts first."""
    inputs = Path(os.environ.get("KIT_KAGGLE_ROOT") or "/kaggle") / "input"
    own = (model, framework.lower(), variation, version)
    return [inputs.joinpath("models", owner, *own), inputs.joinpath(*own)]


def cache() -> Path:
    """Hugging Face's cache, as its documentation places it."""
    named = os.environ.get("HF_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or Path(general) / "huggingface"
    return Path(home).expanduser() / "hub"


def snapshots(owner: str, name: str, revision: str) -> list[Path]:
    """Where a repository's files of a branch, a tag or a commit lie in that cache."""
    home = cache() / f"models--{owner}--{name}"
    ref = home / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    return [home / "snapshots" / commit]


def _parts(reference: str, name: str, number: int) -> list[str]:
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    if len(parts) != number or not plain:
        form = {5: "owner/model/framework/variation/version", 2: "owner/name"}[number]
        kind = reference.partition(":")[0]
        raise ValueError(f"{reference!r} is not of the form {kind}:{form}")
    return parts
