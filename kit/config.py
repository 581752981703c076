"""Configurations as frozen dataclasses: checked, rebuilt from JSON, changed by field name.

A configuration may hold others (a stage its augmentation); no two fields in it share a name, so a
user changes any of them by name alone.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from kit import files

Config = TypeVar("Config")


def check(
    config: Any,
    label: str = "",
    *,
    least: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuses a field of another type, a number that is not finite or out of its limits, an unknown choice.

    label: what stands before the message, such as the stage's name.
    """
    say = f"{label}: " if label else ""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if not _fits(value, field.type):
            raise ValueError(f"{say}{name} cannot be {value!r}")
        if least and name in least and not value >= least[name]:
            raise ValueError(f"{say}{name} is {value}, not at least {least[name]}")
        if most and name in most and not value <= most[name]:
            raise ValueError(f"{say}{name} is {value}, not at most {most[name]}")
        if below and name in below and not value < below[name]:
            raise ValueError(f"{say}{name} is {value}, not below {below[name]}")
        if choices and name in choices and value not in choices[name]:
            listed = ", ".join(choices[name])
            raise ValueError(f"{say}{name} {value!r} is not one of {listed}")


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration that `dataclasses.asdict` and JSON took apart."""
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
    for field in dataclasses.fields(kind):
        missing = dataclasses.MISSING
        if (
            field.name not in values
            and field.default is field.default_factory is missing
        ):
            raise ValueError(f"{kind.__name__} lacks field {field.name!r}")
    return kind(**{name: _build(known[name], value) for name, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """What JSON can hold of a configuration; paths become text."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def write(config: Any, path: Path) -> Path:
    return files.write_json(path, to_dict(config))


def read(kind: type[Config], path: Path) -> Config:
    values = files.read_json(path)
    if type(values) is not dict:
        raise ValueError(f"{path}: not the fields of a {kind.__name__}")
    try:
        return from_dict(kind, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_argument(
    kind: type[Config], arguments: Sequence[str] | None, about: str
) -> Config:
    """The configuration in the one JSON file that a command line names.

    arguments: None for this process's. about: what `--help` says.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "job",
        type=Path,
        help=f"JSON with the fields of {kind.__module__}.{kind.__name__}, as a step writes it",
    )
    return read(kind, parser.parse_args(arguments).job)


def change(config: Config, **fields: Any) -> Config:
    """`config` with some fields changed, those of the configurations in it by their own names."""
    there = field_names(config)
    for name in fields:
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f" (close: {close[0]})" if close else ""
            raise ValueError(f"no field {name!r}{hint}; fields: {', '.join(there)}")
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = field_names(value)
            own = {name: new for name, new in fields.items() if name in inner}
            changes[field.name] = change(value, **own) if own else value
        elif field.name in fields:
            changes[field.name] = _build(field.type, fields[field.name])
    return dataclasses.replace(config, **changes)


def field_names(config: Any) -> list[str]:
    """Every field that holds a value, in order; refuses a name that stands twice."""
    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names += field_names(value) if dataclasses.is_dataclass(value) else [field.name]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TypeError(f"{type(config).__name__} has two fields {twice!r}")
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(kind: Any, value: Any) -> Any:
    """`value` as JSON has it -> as a field of type `kind` has it."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return from_dict(kind, value)
    if get_origin(kind) is tuple and isinstance(value, list):
        inner = get_args(kind)
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_build(k, v) for k, v in zip(kinds, value, strict=True))
    return value


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        inner = get_args(kind)
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # not NaN, not a huge int
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def find_project_file(path: str | Path) -> Path:
    """`path`, or where nothing is there, what it leads to from this project's notebooks.

    So a notebook finds the project's tables from any working directory.
    """
    from_notebooks = Path(__file__).resolve().parents[1] / "notebooks" / path
    if Path(path).exists() or not from_notebooks.exists():
        return Path(path)
    return from_notebooks
