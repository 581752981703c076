"""Two tables that write the same ids in two forms, so that nothing matches and nothing is said."""

import re
from collections.abc import Collection, Iterable

EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}$")


def plain_id(name: str) -> str:
    """An id without what tools add to it or lose of it.

    `index/0/1/01AB.jpg`, `01ab`, `1ab` and `1ab.0` are all `1ab`.
    """
    last = name.strip().replace("\\", "/").rpartition("/")[2]
    return EXTENSION.sub("", last).lower().lstrip("0") or "0"


def refuse_other_form(
    ids: Iterable[str], known: Collection[str], source: object, of: str
) -> None:
    """Raise ValueError where most ids that `known` has are written in another form in `ids`.

    Such as with `.jpg` or a folder, in upper case, or as numbers that lost zeros. Ids that `known`
    lacks in any form are no sign of it: they are other images, and a wrong answer is no error.
    source: where `ids` are from; of: what `known` is, both for the message.
    """
    known = set(known)
    ids = dict.fromkeys(ids)
    exact = sum(name in known for name in ids)
    if exact > len(ids) // 2 or not known:
        return
    spelling = {plain_id(name): name for name in known}
    others = [n for n in ids if n not in known and n and plain_id(n) in spelling]
    if len(others) > exact:
        ours = others[0]
        raise ValueError(
            f"{source}: {len(others)} of {len(ids)} ids are those of {of} in another form, such as "
            f"{ours!r} for {spelling[plain_id(ours)]!r}; write them alike, or nothing matches"
        )
