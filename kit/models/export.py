"""A saved network as one ONNX file, held against torch before it is handed over.

`python -m kit.models.export FOLDER OUT.onnx [--size HEIGHT WIDTH]`

In: `images`, (B, 3, H, W) float32, normalised (`InputSpec.normalise`), any B, fixed H and W.
Out: `embeddings`, (B, D) float32, not yet of unit length.
The file's metadata has the network's configuration, what normalises its input included.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from kit import files
from kit.models import net as nets

log = logging.getLogger(__name__)

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # largest difference of a number in an embedding
LARGEST = 2**31 - 2**24  # bytes of weights: a protobuf ends at 2 GiB


def onnx(folder: Path, out: Path, size: tuple[int, int] | None = None) -> Path:
    """Writes the network saved in `folder` to `out`, if onnxruntime computes what torch does.

    size: height and width of the images; None: the square the network was saved with.
    """
    format_ = _packages()[0]
    net = nets.load(folder, channels_last=False)
    if sum(each.nbytes for each in net.state_dict().values()) > LARGEST:
        raise ValueError(f"{folder}: its weights do not fit in an ONNX file's 2 GiB")
    height, width = size or (net.config.input.size,) * 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, height, width, generator=generator)
    program = torch.onnx.export(
        net,
        (images[:2],),
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    about = nets.describe(folder)
    model = program.model_proto
    facts = {"config": json.dumps(about["config"]), "weights": about["hash"]}
    format_.helper.set_model_props(model, facts)
    with files.replacing(out) as temporary:
        format_.save_model(model, temporary)
        largest = difference(net, temporary, images)
        if not largest <= TOLERANCE:
            raise ValueError(
                f"{out}: onnxruntime's embeddings differ from torch's by {largest:.1e}, "
                f"more than {TOLERANCE}; nothing is written"
            )
    log.info("%s: largest difference to torch %.1e", out, largest)
    return out


@torch.inference_mode()
def difference(net: nets.EmbeddingNet, path: Path, images: torch.Tensor) -> float:
    """Largest difference of a number in the embeddings; images: (B, 3, H, W), normalised."""
    runtime = _packages()[2]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(["embeddings"], {"images": images.numpy()})
    return float(np.abs(theirs - net(images).numpy()).max())


def _packages() -> list[ModuleType]:
    try:
        return [import_module(name) for name in PACKAGES]
    except ImportError:
        raise ModuleNotFoundError(
            f"ONNX export needs the packages {', '.join(PACKAGES)}: "
            f"pip install {' '.join(PACKAGES)}"
        ) from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kit.models.export")
    parser.add_argument("folder", type=Path, help="a trained stage: model.json beside")
    parser.add_argument("out", type=Path, help="the file to write, OUT.onnx")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)  # the exporter's own notes stay unsaid
    try:
        onnx(given.folder, given.out, given.size and tuple(given.size))
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
