"""Feature maps (B, C, H, W) -> one vector an image, by a string such as `G` or `SMG,MG,G,G`.

One entry for every stage of the backbone that is pooled, from an earlier one to the last;
every letter of an entry pools that stage's map, and what comes out stands side by side.
Everything is computed in float32, under autocast too: cubes leave half precision's range.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit.models.dolg import DOLG

DOLG_SPEC = "dolg"
LETTERS = {
    "G": "GeM",
    "C": "GeM with a power per channel",
    "S": "SPoC",
    "M": "MAC",
    "R": "R-MAC",
    "L": "regional GeM",
}


def gem(x: Tensor, p: Tensor | float = 3.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean over space (Radenovic et al., TPAMI 2018).

    p: one power, or (C,), one per channel.
    """
    x = x.float().clamp(min=eps)
    # relative to the largest value no power overflows, nor does a plane of zeros vanish;
    # the mean is homogeneous, so its gradient does not see this scale
    scale = x.detach().amax(dim=(-2, -1), keepdim=True)
    spatial = p[:, None, None] if isinstance(p, Tensor) and p.ndim else p
    mean = (x / scale).pow(spatial).mean(dim=(-2, -1))
    return scale[..., 0, 0] * mean.pow(1.0 / p)


def spoc(x: Tensor) -> Tensor:
    """Mean over space (sum-pooled convolutions, Babenko and Lempitsky, ICCV 2015)."""
    return x.float().mean(dim=(-2, -1))


def mac(x: Tensor) -> Tensor:
    """Maximum over space (Razavian et al., 2014)."""
    return x.float().amax(dim=(-2, -1))


def rmac(x: Tensor, levels: int = 3) -> Tensor:
    """(B, C) of unit length: sum of the regions' unit maxima (Tolias et al., ICLR 2016)."""
    total = x.new_zeros(x.shape[:2], dtype=torch.float32)
    for top, left, side in regions(*x.shape[-2:], levels):
        total = total + F.normalize(mac(x[..., top : top + side, left : left + side]))
    return F.normalize(total)


def regions(height: int, width: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """(top, left, side) of R-MAC's squares: at level l, l on the short side of the map.

    On the long one as many more as let those of level 1 overlap by close to 40 %.
    """
    short, long = sorted((height, width))
    more = 0
    if long > short:
        apart = (long - short) / short  # of the first and the last, in sides
        more = min(range(1, 2 + int(apart / 0.6)), key=lambda n: abs(0.6 - apart / n))
    squares = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        tops = _spread(height - side, level + (more if height > width else 0))
        lefts = _spread(width - side, level + (more if width > height else 0))
        squares += [(top, left, side) for top in tops for left in lefts]
    return squares


def regional_gem(
    x: Tensor, p: Tensor | float = 3.0, region_p: float = 2.5, side: int = 5
) -> Tensor:
    """GeM of the map averaged with the GeM of every place's neighbourhood (SuperGlobal).

    Shao et al., ICCV 2023. Borders are reflected, so a map smaller than the neighbourhood
    shrinks it.
    """
    x = x.float().clamp(min=1e-6)
    high, wide = (min(side // 2, n - 1) for n in x.shape[-2:])
    around = F.pad(x.pow(region_p), (wide, wide, high, high), mode="reflect")
    regional = F.avg_pool2d(around, (2 * high + 1, 2 * wide + 1), stride=1)
    return gem((x + regional.pow(1 / region_p)) / 2, p)


class GeM(nn.Module):
    """`gem` with its power `p`: frozen, or trained from where it starts."""

    def __init__(
        self, p: float = 3.0, trainable: bool = False, channels: int = 0
    ) -> None:
        """channels: as many powers; 0: one for all."""
        super().__init__()
        start = torch.full((channels,) if channels else (), float(p))
        self.p = nn.Parameter(start, requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        return gem(x, self.p)


class RegionalGeM(GeM):
    """`regional_gem` with its power `p`."""

    def forward(self, x: Tensor) -> Tensor:
        return regional_gem(x, self.p)


class Fixed(nn.Module):
    """A pool without parameters, as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Pool(nn.Module):
    """The pools that a string names, side by side: maps of the stages -> (B, dim)."""

    def __init__(
        self, spec: str, channels: Sequence[int], p: float, trainable: bool
    ) -> None:
        super().__init__()
        entries = list(zip(spec.split(","), channels, strict=True))
        self.layers = nn.ModuleList(
            nn.ModuleList(_layer(letter, width, p, trainable) for letter in entry)
            for entry, width in entries
        )
        self.dim = sum(len(entry) * width for entry, width in entries)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        pairs = zip(maps, self.layers, strict=True)
        return torch.cat([pool(x) for x, pools in pairs for pool in pools], dim=1)


def stages(spec: str) -> int:
    """How many stages of the backbone `spec` pools; refuses what is no such string."""
    if spec == DOLG_SPEC:
        return 2
    entries = spec.split(",")
    for letter in "".join(entries):
        if letter not in LETTERS:
            listed = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
            raise ValueError(
                f"pool {spec!r}: {letter!r} is not one of {listed}; or take {DOLG_SPEC!r}"
            )
    if not all(entries):
        raise ValueError(f"pool {spec!r}: entry {entries.index('') + 1} has no letter")
    return len(entries)


def create(
    spec: str, channels: Sequence[int], p: float = 3.0, trainable: bool = False
) -> nn.Module:
    """The layer that `spec` names: feature maps of the last stages -> (B, its `dim`).

    channels: of those maps, from an earlier stage to the last; p: where GeM's powers start.
    """
    if len(channels) != stages(spec):
        raise ValueError(
            f"pool {spec!r} takes {stages(spec)} feature maps, not {len(channels)}"
        )
    if spec == DOLG_SPEC:
        return DOLG(*channels, GeM(p, trainable))
    return Pool(spec, channels, p, trainable)


def _layer(letter: str, channels: int, p: float, trainable: bool) -> nn.Module:
    match letter:
        case "G":
            return GeM(p, trainable)
        case "C":
            return GeM(p, trainable, channels)
        case "L":
            return RegionalGeM(p, trainable)
    return Fixed({"S": spoc, "M": mac, "R": rmac}[letter])


def _spread(length: int, count: int) -> list[int]:
    """`count` whole numbers from 0 to `length`, evenly; the first alone is 0."""
    return [i * length // max(1, count - 1) for i in range(count)]
