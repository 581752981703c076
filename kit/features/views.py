"""What extraction makes of an image: sizes, shapes and scales, and one embedding of them all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kit import config
from kit.data import templates
from kit.data.inputs import InputSpec, View
from kit.models.net import EmbeddingNet

OWN, SQUARE = "own", "square"


@dataclass(frozen=True)
class Views:
    """Which inputs an image becomes, and how their embeddings become one.

    The 2nd place of Google Landmark Retrieval 2021 has scales 0.707, 1, 1.414 and otherwise
    these defaults; the 1st place of 2019 has template L2, scales 0.75, 1, 1.25, multiple 32,
    least 128. Each scale is one resize of the decoded picture, where both resize it twice.
    """

    size: int = (
        0  # side of the square, or longest; 0: the template's own, else the model's
    )
    template: str = OWN  # the model's; "square"; or one of kit.data.templates
    scales: tuple[float, ...] = (1.0,)  # of both sides; 1 leaves them as they are
    multiple: int = 16  # a scaled side goes down to a multiple of it
    least: int = 32  # and not below
    flip: bool = False  # each scale's mirror image too
    normalise: bool = False  # each embedding before the sum; both systems sum raw ones

    def __post_init__(self) -> None:
        named = (OWN, SQUARE, *templates.NAMES)
        limits = {"size": 0, "multiple": 1, "least": 1}
        config.check(self, least=limits, choices={"template": named})
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales {self.scales} are none, or not all above 0")

    def of(self, spec: InputSpec) -> InputSpec:
        """The input at scale 1 of a model whose own is `spec`."""
        if self.template == OWN:
            return replace(spec, size=self.size or spec.size)
        if self.template in (SQUARE, *templates.FREE):
            template = "" if self.template == SQUARE else self.template
            return replace(spec, size=self.size or spec.size, template=template)
        side = self.size or templates.square_side(self.template)
        return replace(spec, size=side, template=self.template)

    def each(self, spec: InputSpec) -> list[View]:
        """One view a scale; models whose views are equal can share their pixels."""
        # what is done on the device makes no other pixels
        spec = replace(self.of(spec), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return [View(spec, scale, self.multiple, self.least) for scale in self.scales]

    def facts(self, spec: InputSpec) -> dict[str, Any]:
        """All of it in JSON's types, as it is for a model whose own input is `spec`."""
        made = self.of(spec)
        known = {"size": made.size, "template": made.template or SQUARE}
        return config.to_dict(self) | known | {"scales": list(self.scales)}


@torch.inference_mode()
def embed(
    net: EmbeddingNet,
    scales: Sequence[Tensor],
    flip: bool = False,
    normalise: bool = False,
) -> Tensor:
    """The same images at each scale, (B, 3, h, w) uint8 -> (B, D) float32 of unit length."""
    total = torch.zeros(len(scales[0]), net.dim, device=scales[0].device)
    for images in scales:
        x = net.config.input.normalise(images)
        for seen in (x, x.flip(-1)) if flip else (x,):
            found = net(seen).float()
            total += F.normalize(found) if normalise else found
    return F.normalize(total)
