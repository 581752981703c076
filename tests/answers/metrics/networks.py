"""Small networks that were never trained, and pictures for them."""

from pathlib import Path

import cv2
import numpy as np
import torch

from kit.data.inputs import InputSpec
from kit.models import net as nets

SEEN = {"f" * 64: "clean"}


def saved(runs: Path, *names: str) -> list[Path]:
    torch.manual_seed(0)
    for number, name in enumerate(names):
        config = nets.NetConfig("test_resnet", dim=8 + number, input=InputSpec(size=32))
        nets.save(nets.build(config).eval(), runs / name, SEEN)
    return [runs / name for name in names]


def picture(path: Path, seed: int, height: int = 40, width: int = 48) -> Path:
    """Coarse colours, so that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(path), found)
    return path
