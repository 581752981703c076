"""EmbeddingNet: backbone -> pool -> neck, built from a NetConfig that is saved beside its weights."""

import difflib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kit
from kit import files
from kit.data.inputs import InputSpec
from kit.models.pooling import GeM
from kit.models.weights import load_backbone, load_strictly, write_weights

NECKS = ("bn", "none")


@dataclass(frozen=True)
class NetConfig:
    """Everything that rebuilds a network before its weights are loaded."""

    backbone: str = "resnet50"  # a name that timm knows
    pretrained: str = ""  # "timm" (its hub), "lite0" (the package), a file; "": none
    pool_p: float = 3.0  # power of GeM
    pool_trainable: bool = False
    neck: str = "bn"  # linear layer, then batch norm (2021); "none": as pooled
    dim: int = 512  # of the embedding; without a neck the backbone decides
    neck_bias: bool = False  # of the linear layer; the batch norm's is frozen at zero
    input: InputSpec = field(default_factory=InputSpec)

    def __post_init__(self) -> None:
        if self.neck not in NECKS:
            raise ValueError(f"neck {self.neck!r} is not one of {', '.join(NECKS)}")

    @staticmethod
    def from_dict(values: dict) -> "NetConfig":
        given = dict(values)
        spec = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in given.pop("input", {}).items()
        }
        return NetConfig(**given, input=InputSpec(**spec))


class EmbeddingNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, D) embedding, not yet of unit length."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config.backbone)
        channels = self.backbone.num_features
        self.pool = GeM(config.pool_p, config.pool_trainable)
        self.neck: nn.Module = nn.Identity()
        self.dim = channels
        if config.neck == "bn":
            linear = nn.Linear(channels, config.dim, bias=config.neck_bias)
            nn.init.xavier_uniform_(linear.weight)
            norm = nn.BatchNorm1d(config.dim)
            norm.bias.requires_grad_(False)
            self.neck = nn.Sequential(linear, norm)
            self.dim = config.dim

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.forward_features(x)
        if maps.ndim != 4 or maps.shape[1] != self.backbone.num_features:
            raise ValueError(
                f"{self.config.backbone} gives {tuple(maps.shape)}, not feature maps "
                "(B, C, H, W): only convolutional backbones can be pooled so far"
            )
        return self.neck(self.pool(maps))


def _backbone(name: str) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"backbone {name!r} is not one of timm's"
            + (f"; close: {', '.join(close)}" if close else "")
        )
    return timm.create_model(name, pretrained=False, num_classes=0, global_pool="")


def build(config: NetConfig) -> EmbeddingNet:
    """A network to train: random but for what `config.pretrained` brings."""
    net = EmbeddingNet(config)
    if config.pretrained == "timm":
        hub = timm.create_model(
            config.backbone, pretrained=True, num_classes=0, global_pool=""
        )
        net.backbone.load_state_dict(hub.state_dict())
    elif config.pretrained:
        load_backbone(net.backbone, config.pretrained)
    return net


def half_precision(device: torch.device) -> torch.dtype | None:
    """What autocast uses there: bfloat16 where the GPU has it, float16 on older ones, None on CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def save(net: EmbeddingNet, folder: Path, seen: dict[str, str]) -> Path:
    """Writes `model.safetensors`, then `model.json`, which makes the pair valid.

    seen: hash -> name of every image list these weights met, through all stages.
    """
    write_weights(folder / "model.safetensors", net.state_dict())
    about = {
        "config": asdict(net.config),
        "dim": net.dim,
        "seen": seen,
        "hash": files.sha256(folder / "model.safetensors"),
        "kit": kit.__version__,
    }
    files.write_json(folder / "model.json", about)
    return folder


def load(folder: Path, device: torch.device | str = "cpu") -> EmbeddingNet:
    """The network saved in `folder`, in eval mode."""
    about = describe(folder)
    net = EmbeddingNet(NetConfig.from_dict(about["config"]))
    load_weights(net, folder)
    return net.to(device, memory_format=torch.channels_last).eval()


def load_weights(net: EmbeddingNet, folder: Path) -> None:
    """Fills `net` from `folder`; refuses weights that model.json does not describe."""
    path = folder / "model.safetensors"
    if not path.exists() or files.sha256(path) != describe(folder)["hash"]:
        raise ValueError(
            f"{path} is not the file that model.json describes; run the stage again"
        )
    load_strictly(net, load_file(path), path)


def describe(folder: Path) -> dict:
    """model.json: config, dim, seen, hash."""
    path = folder / "model.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no model in {folder}; run 02_train_stage for it first"
        )
    return files.read_json(path)
