"""Trained networks -> folders that Kaggle and the Hugging Face hub take as models, with a card.

<out>/model-metadata.json    the Kaggle model: owner, slug, title, its card
<out>/<variation>/           one network, on either site
  README.md                    its card in Markdown, with the hub's front matter
  model.safetensors, model.json
  model-instance-metadata.json what Kaggle's client reads of a variation
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import config, files
from kit.answers import gain_table
from kit.kaggle import flat, manifest
from kit.kaggle.contents import slug
from kit.models import net as nets

FRAMEWORK = "pyTorch"
LICENCES = {  # the hub's name of a licence: Kaggle's name of it for models
    "apache-2.0": "Apache 2.0",
    "cc-by-4.0": "Attribution 4.0 International (CC BY 4.0)",
    "cc0-1.0": "CC0: Public Domain",
    "mit": "MIT",
}
_LOAD = """```python
from kit.models import net

model = net.load("{reference}")  # or the folder's path
vectors = model(model.config.input.normalise(images))  # (B, 3, H, W) uint8 -> (B, D)
```"""
TAGS = ("image-retrieval", "instance-recognition", "landmarks", "pytorch")


def folder(
    runs: Path,
    recipe: str,
    names: Sequence[str],
    out: Path,
    *,
    user: str,
    name: str,
    gains: Path | None = None,
    licence: str = "cc-by-4.0",
) -> Path:
    """Writes `out`: a Kaggle model <user>/<name> with a variation for each network.

    runs: folder of the networks; names: of theirs in it; gains: CSV of a run's mAP by step,
    which may be missing; licence: one of LICENCES. Weights are hard links where the disk
    allows.
    """
    if licence not in LICENCES:
        raise ValueError(f"licence {licence!r} is not one of {', '.join(LICENCES)}")
    variations = {each: slug(each) for each in names}
    if not names or len(set(variations.values())) < len(names):
        raise ValueError(f"networks {names} are none, or two make one variation")
    rows = gain_table.read(gains) if gains is not None and gains.exists() else []
    for each, variation in variations.items():
        about = nets.describe(runs / each)
        reference = f"{user}/{name}/{FRAMEWORK}/{variation}"
        text = card(about, recipe, each, f"kaggle:{reference}/VERSION", rows, licence)
        files.write_text(out / variation / "README.md", text)
        for part in ("model.json", "model.safetensors"):
            flat.carry(runs / each / part, out / variation / part)
        files.write_json(
            out / variation / manifest.VARIATION,
            {
                "ownerSlug": user,
                "modelSlug": name,
                "instanceSlug": variation,
                "framework": FRAMEWORK,
                "overview": f"{each} of recipe {recipe}",
                "usage": _body(text),
                "licenseName": LICENCES[licence],
                "fineTunable": True,
                "trainingData": sorted(set(about["seen"].values())),
            },
        )
    listed = "\n".join(f"- {variations[each]}: {each}" for each in names)
    files.write_json(
        out / manifest.MODEL_METADATA,
        {
            "ownerSlug": user,
            "slug": name,
            "title": name.replace("-", " "),
            "subtitle": f"Image embeddings of recipe {recipe}",
            "isPrivate": True,
            "description": f"Networks of recipe {recipe}, one a variation.\n\n{listed}\n",
        },
    )
    return out


def card(
    about: Mapping[str, Any],
    recipe: str,
    name: str,
    reference: str,
    gains: Sequence[tuple[str, float, float, str]],
    licence: str,
) -> str:
    """A network's card; about: its model.json; gains: of `gain_table.read`."""
    net = config.from_dict(nets.NetConfig, about["config"])
    shown = net.input
    head = ["---", f"license: {licence}", "library_name: landmark-kit"]
    head += ["pipeline_tag: image-feature-extraction", "tags:"]
    head += [f"- {tag}" for tag in TAGS]
    facts = {
        "backbone": net.backbone,
        "embedding": f"{about['dim']} numbers; divide by their length, compare by cosine",
        "input": f"{shown.size} px, {shown.template or shown.resize}, {shown.colour}",
        "weights": f"SHA-256 `{about['hash']}`",
        "written by": f"landmark-kit {about['kit']}",
    }
    met = [(each, f"`{sha}`") for sha, each in about["seen"].items()]
    parts = [
        "\n".join([*head, "---"]),
        f"# {name} of {recipe}",
        "Embeds a photo, so that photos of the same landmark are near each other.",
        _table(("", ""), facts.items()),
        "## Image lists that these weights met",
        _table(("list", "SHA-256"), met) if met else "None: it is not trained.",
        "A number that is measured on images of these lists tells nothing about new ones.",
        "## Results",
        *_results(recipe, gains),
        "## How to load",
        _LOAD.format(reference=reference),
        "## Licence",
        f"{LICENCES[licence]}, of the weights. Training images keep their own licences.",
    ]
    return "\n\n".join(parts) + "\n"


def _results(recipe: str, gains: Sequence[tuple[str, float, float, str]]) -> list[str]:
    if not gains:
        return ["Not measured."]
    rows = [(step, f"{a:.4f}", f"{b:.4f}", note) for step, a, b, note in gains]
    said = f"mAP@100 of recipe {recipe}, all its networks together, after each step."
    return [said, _table(gain_table.COLUMNS, rows)]


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(each).replace("|", "\\|") for each in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _body(text: str) -> str:
    """A card without its front matter, which only the hub reads."""
    return text.split("---\n", 2)[2].lstrip()
