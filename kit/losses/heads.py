"""Classifiers on embeddings: (B, D) embedding and (B,) labels -> loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit.losses.margins import arcface


class ArcFace(nn.Module):
    """Cosine classifier with an additive angular margin; its rows are the classes' centres."""

    def __init__(
        self, dim: int, classes: int, margin: float = 0.3, scale: float = 30.0
    ) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        # float32 under autocast too: half-precision logits near the scale are 1/64 apart
        with torch.autocast(embedding.device.type, enabled=False):
            cosines = F.linear(F.normalize(embedding.float()), F.normalize(self.weight))
            return F.cross_entropy(
                arcface(cosines, labels, self.margin, self.scale), labels
            )
