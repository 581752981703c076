"""LoRA (Hu et al., ICLR 2022) through peft: small matrices learn in place of a large ViT's own."""

import copy

from torch import nn

from kit.models.net import EmbeddingNet


def add(net: EmbeddingNet, rank: int) -> None:
    """Adapters of this rank on every linear layer of the backbone, whose own weights stand still.

    In place; the neck keeps learning, all else of the backbone is frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    backbone = net.backbone
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{net.config.backbone} has no linear layer to adapt: set lora=0, or take a ViT"
        )
    how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    inject_adapter_in_model(how, backbone)


def merged(net: EmbeddingNet) -> EmbeddingNet:
    """A copy with the adapters multiplied into the weights: the plain network again."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(net)
    adapted = [(n, m) for n, m in plain.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(plain.get_submodule(parent), own, layer.get_base_layer())
    return plain
