"""EmbeddingNet: backbone -> pool -> neck, built from a NetConfig that is saved beside its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

import kit
from kit import checksums, files
from kit import config as configs
from kit.data.inputs import InputSpec
from kit.models import backbones, pooling, references
from kit.models.weights import fill, load_backbone, load_strictly, write_weights

NECKS = ("bn", "none")
INITS = {"uniform": nn.init.xavier_uniform_, "normal": nn.init.xavier_normal_}
REPAIR = "make it again: --force the pipeline's 02_train step (of untrained: 03_features_untrained)"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class NetConfig:
    """Everything that rebuilds a network before its weights are loaded."""

    backbone: str = "resnet50"  # a name that kit.models.backbones or timm knows
    pretrained: str = (
        ""  # "timm" (its hub), "lite0" to "lite2" (packages), a file; "": none
    )
    stride: int = 0  # pixels a step of the last map stands for; 0: the backbone's own
    drop_path: float = 0.0  # largest rate of stochastic depth
    pool: str = "G"  # kit.models.pooling: "G", "G,G,G,G", "SMG,MG,G,G", "dolg", ...
    pool_p: float = 3.0  # power of GeM
    pool_trainable: bool = False
    neck: str = "bn"  # linear layer, then batch norm; "none": as pooled
    dim: int = 512  # of the embedding; without a neck the pool decides
    neck_bias: bool = False  # of the linear layer (2019 has it)
    neck_norm_bias: bool = False  # of the batch norm: trained, or frozen at zero
    neck_init: str = "uniform"  # Xavier's (2021), or "normal" (2019)
    prelu: bool = False  # after the neck's batch norm
    dropout: float = 0.0  # the neck's last step
    input: InputSpec = field(default_factory=InputSpec)

    def __post_init__(self) -> None:
        configs.check(
            self,
            least={"stride": 0, "drop_path": 0, "pool_p": 1, "dim": 1, "dropout": 0},
            most={"drop_path": 0.9, "dropout": 0.9},
            choices={"neck": NECKS, "neck_init": tuple(INITS)},
        )
        pooling.stages(self.pool)


class EmbeddingNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, D) embedding, float32, not yet of unit length."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbones.create(
            config.backbone,
            stride=config.stride,
            drop_path=config.drop_path,
            size=config.input.size,
        )
        self.stages = pooling.stages(config.pool)
        channels = backbones.channels(self.backbone, self.stages)
        self.pool = pooling.create(
            config.pool, channels, config.pool_p, config.pool_trainable
        )
        self.neck: nn.Module = nn.Identity()
        self.dim = self.pool.dim
        if config.neck == "bn":
            self.neck, self.dim = _neck(self.pool.dim, config), config.dim
        self.norms_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(backbones.maps(self.backbone, x, self.stages))
        # what is compared in the end is not rounded to half precision
        with torch.autocast(x.device.type, enabled=False):
            return self.neck(pooled)

    def train(self, mode: bool = True) -> "EmbeddingNet":
        super().train(mode)
        if self.norms_frozen:
            for norm in _batch_norms(self):
                norm.eval()
        return self


def _neck(channels: int, config: NetConfig) -> nn.Sequential:
    linear = nn.Linear(channels, config.dim, bias=config.neck_bias)
    INITS[config.neck_init](linear.weight)
    norm = nn.BatchNorm1d(config.dim)
    norm.bias.requires_grad_(config.neck_norm_bias)
    neck = nn.Sequential(linear, norm)
    if config.prelu:
        neck.append(nn.PReLU())
    if config.dropout:
        neck.append(nn.Dropout(config.dropout))
    return neck


def build(config: NetConfig) -> EmbeddingNet:
    """A network to train: random but for what `config.pretrained` brings."""
    net = EmbeddingNet(config)
    if config.pretrained == "timm":
        _fill_from_hub(net.backbone, config.backbone)
    elif config.pretrained:
        load_backbone(net.backbone, config.pretrained)
    return net


def _fill_from_hub(backbone: nn.Module, name: str) -> None:
    preset = backbones.PRESETS.get(name)
    known = preset is None or "timm" in preset.weights
    hub = preset.timm if preset else name
    about = timm.models.get_pretrained_cfg(hub)
    if not known or about is None or not about.has_weights:  # timm would stay random
        raise ValueError(
            f"timm has no weights of {name}: set pretrained to a file's path"
        )
    model = timm.create_model(hub, pretrained=True, num_classes=0, global_pool="")
    fill(backbone, model.state_dict(), f"timm's {hub}")


def half_precision(device: torch.device) -> torch.dtype | None:
    """What autocast uses there: bfloat16 where the GPU has it, float16 on older ones, None on CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def freeze_norms(net: EmbeddingNet) -> None:
    """Every batch norm keeps its statistics, weight and bias, `net.train()` or not (2019's last epoch).

    Before the network is wrapped for several processes, which looks at what is trained.
    """
    for norm in _batch_norms(net):
        norm.requires_grad_(False)
    net.norms_frozen = True
    net.train(net.training)


def sync_norms(net: EmbeddingNet) -> None:
    """Every batch norm takes its statistics over all processes; on GPUs only.

    timm's own conversion: torch's drops the activation in timm's BatchNormAct2d.
    """
    convert_sync_batchnorm(net)


def checkpoint_activations(net: EmbeddingNet) -> None:
    """The backbone's activations are computed again in the backward pass instead of kept."""
    try:
        net.backbone.set_grad_checkpointing()
    except AssertionError:  # how timm says that it cannot
        raise ValueError(
            f"backbone {net.config.backbone} cannot recompute its activations; "
            "train without checkpointing"
        ) from None


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """Around a backward pass that computes activations again: a batch counts once in the norms."""
    kept = [buffer for norm in _batch_norms(net) for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in kept]
    yield
    for buffer, value in zip(kept, before, strict=True):
        buffer.copy_(value)


def save(net: nn.Module, folder: Path, seen: dict[str, str]) -> Path:
    """Writes `model.safetensors`, then `model.json`, which makes the pair valid.

    net: an EmbeddingNet, also compiled or wrapped; seen: hash -> name of every image list
    these weights met, through all stages.
    """
    while not isinstance(net, EmbeddingNet):
        net = net._orig_mod if hasattr(net, "_orig_mod") else net.module
    weights = {_plain_name(net, name): x for name, x in net.state_dict().items()}
    write_weights(folder / "model.safetensors", weights)
    about = {
        "config": asdict(net.config),
        "dim": net.dim,
        "seen": seen,
        "hash": files.sha256(folder / "model.safetensors"),
        "checksums": checksums.compute_checksums(folder, ["model.safetensors"]),
        "kit": kit.__version__,
    }
    checksums.write_manifest(folder / "model.json", about)
    return folder


def load(
    reference: Path | str,
    device: torch.device | str = "cpu",
    channels_last: bool = True,
) -> EmbeddingNet:
    """The saved network, in eval mode; reference: its folder, or as kit.models.references has it."""
    folder = references.folder(reference)
    net = EmbeddingNet(configs.from_dict(NetConfig, describe(folder)["config"]))
    load_weights(net, folder)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(device, memory_format=form).eval()


def load_weights(net: EmbeddingNet, folder: Path) -> None:
    """Fills `net` from `folder`; refuses weights that model.json does not describe."""
    path = folder / "model.safetensors"
    if not path.exists() or files.sha256(path) != describe(folder)["hash"]:
        raise checksums.Damaged(
            f"{path} is not the file that model.json describes; {REPAIR}"
        )
    load_strictly(net, load_file(path), path)


def describe(folder: Path) -> dict:
    """model.json: config, dim, seen, hash."""
    path = folder / "model.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no model in {folder}; run 02_train_stage for it first"
        )
    return checksums.read_manifest(path, REPAIR, ("config", "dim", "seen", "hash"))


def _batch_norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, BatchNorm)]


def _plain_name(net: nn.Module, name: str) -> str:
    """A tensor's name without what torch.compile and wrappers of modules put into it."""
    plain, module = [], net
    for part in name.split("."):
        if part != "_orig_mod" and not isinstance(module, WRAPPERS):
            plain.append(part)
        module = getattr(module, part)
    return ".".join(plain)
