import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from kit import config


@dataclass(frozen=True)
class Pixels:
    shift: float = 0.0
    boxes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        config.check(self, least={"shift": 0}, most={"shift": 1})


@dataclass(frozen=True)
class Plan:
    name: str
    mode: str = "one"
    steps: int = 3
    on: bool = False
    mean: tuple[float, float] = (0.0, 1.0)
    pixels: Pixels = field(default_factory=Pixels)

    def __post_init__(self):
        config.check(
            self,
            f"plan {self.name}",
            least={"steps": 1},
            choices={"mode": ["one", "two"]},
        )


PLAN = Plan("p", "two", 5, True, (0.5, 2), Pixels(0.5, ((1, 2), (3, 4))))


def test_a_configuration_survives_json():
    assert config.from_dict(Plan, json.loads(json.dumps(asdict(PLAN)))) == PLAN


def test_a_configuration_survives_a_file(tmp_path):
    @dataclass(frozen=True)
    class Job:
        plan: Plan
        folder: Path

    job = Job(PLAN, tmp_path / "runs")
    assert config.read(Job, config.write(job, tmp_path / "job.json")) == job


def test_fields_are_changed_by_their_own_names_wherever_they_stand():
    assert config.change(PLAN) == PLAN
    changed = config.change(PLAN, steps=7, shift=0.25, mean=[1, 2], boxes=[[5, 6]])
    assert changed == Plan("p", "two", 7, True, (1, 2), Pixels(0.25, ((5, 6),)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "plan p: steps is 0, not at least 1"),
        ({"steps": 2.0}, "plan p: steps cannot be 2.0"),
        ({"steps": True}, "plan p: steps cannot be True"),
        ({"on": 1}, "plan p: on cannot be 1"),
        ({"mode": "three"}, "plan p: mode 'three' is not one of one, two"),
        ({"mode": ["one"]}, r"plan p: mode cannot be \['one'\]"),
        ({"mean": [1.0]}, r"plan p: mean cannot be \[1.0\]"),
        ({"mean": [1.0, "2"]}, r"plan p: mean cannot be \(1.0, '2'\)"),
        ({"shift": -0.1}, "shift is -0.1, not at least 0"),
        ({"shift": 1.5}, "shift is 1.5, not at most 1"),
        ({"shift": float("nan")}, "shift cannot be nan"),
        ({"boxes": [[1, 2.5]]}, r"boxes cannot be \(\(1, 2.5\),\)"),
        ({"stops": 1}, r"no field 'stops' \(close: steps\); fields: name, mode, steps"),
        ({"pixels": 1}, "no field 'pixels'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        config.change(PLAN, **fields)


def test_an_unknown_field_in_a_file_is_refused():
    with pytest.raises(ValueError, match="Pixels has no field 'shade'"):
        config.from_dict(Plan, {"name": "p", "pixels": {"shade": 1}})


def test_two_fields_of_one_name_are_a_mistake():
    @dataclass(frozen=True)
    class Both:
        shift: float = 0.0
        pixels: Pixels = field(default_factory=Pixels)

    with pytest.raises(TypeError, match="Both has two fields 'shift'"):
        config.field_names(Both())
