"""Offline numbers that have seen what they are measured on are refused."""

from collections.abc import Mapping
from pathlib import Path

from kit.data import lists


class LeakError(ValueError):
    """An offline number whose models or references have seen what it is measured on."""


def refuse_leaks(
    folder: Path,
    searched: lists.ImageList,
    seen: Mapping[str, str],
    optimistic: bool = False,
) -> str:
    """ "" where nothing leaks; with `optimistic`, the warning to print beside the number.

    seen: hash -> name of every list that the models trained on or whose images vote.
    """
    found = lists.leaks(seen, folder, searched)
    if not found:
        return ""
    name, count = next(iter(found.items()))
    problem = (
        f"list {name} is not one of those in {folder}, so nobody can tell what it holds"
        if count < 0
        else f"list {name} holds {count} validation queries or images of {searched.name}"
    )
    if not optimistic:
        raise LeakError(
            f"{problem}; use a holdout list, or set optimistic to print it as LEAKY"
        )
    return f"  LEAKY ({problem})"
