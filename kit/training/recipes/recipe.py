"""A network and the stages it goes through."""

from dataclasses import dataclass, replace
from pathlib import Path

from kit.models.net import NetConfig
from kit.training.job import Stage


@dataclass(frozen=True)
class Recipe:
    """A schedule; each stage goes on from the one that its `init` names."""

    name: str
    net: NetConfig
    stages: tuple[Stage, ...]
    clean: str = ""  # what made the clean list, where it is not the public one
    gld_v1_classes: int = 14_950  # most frequent landmarks that the list gld_v1 keeps
    rerank: tuple[str, ...] = ("landmark_country",)  # steps to tune after training

    def network(self, pretrained: str = "recipe", weights: Path = Path()) -> NetConfig:
        """The network, with other pretrained weights if asked; files of weights are in `weights`.

        pretrained: "recipe", or what NetConfig.pretrained takes ("" for random weights).
        """
        asked = self.net.pretrained if pretrained == "recipe" else pretrained
        if Path(asked).suffix in (".pth", ".pt", ".tar", ".safetensors"):
            asked = str(weights / asked)
        return replace(self.net, pretrained=asked)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        there = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"recipe {self.name} has no stage {name!r}; stages: {there}")
