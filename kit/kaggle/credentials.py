"""Where Kaggle's client would find credentials -> what is wrong with them, before it is asked.

The client takes a file that it cannot read for one that is not there, or fails with the key in
its message. Nothing here repeats a value.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

TOKEN, USER, KEY = "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"
ABSENT = (
    f"no Kaggle credentials; set {TOKEN}, or {USER} and {KEY}, "
    "or put kaggle.json in ~/.kaggle"
)
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_HOW = "make a new one in the settings of your account on Kaggle"
TYPES = {list: "a list", str: "text", dict: "an object", bool: "true or false"}


def check_credentials() -> str:
    """The place of the credentials that the client takes first, "" where there are none.

    Raises ValueError with the place and what is wrong there.
    """
    home = Path("~/.kaggle").expanduser()
    if token := os.environ.get(TOKEN):
        return _check_token(token)
    for name in ("access_token", "access_token.txt"):
        if os.path.lexists(home / name):
            _check_letters(str(home / name), _read_text(home / name).strip())
            return str(home / name)
    path = _config_folder(home) / "kaggle.json"
    if place := _check_pair(path):
        return place
    path = home / "credentials.json"
    if os.path.lexists(path):
        value = _read_object(path)
        _check_letters(f"{path}: refresh_token", value.get("refresh_token"))
        return str(path)
    return ""


def _check_token(token: str) -> str:
    """Of the variable, which may name a file."""
    if "/" not in token and not os.path.lexists(token):
        _check_letters(TOKEN, token)
        return TOKEN
    path = Path(token)
    if not os.path.lexists(path):
        raise ValueError(f"{TOKEN} names a file that is not there, or is no token")
    _check_letters(f"the file that {TOKEN} names", _read_text(path, TOKEN).strip())
    return TOKEN


def _check_pair(path: Path) -> str:
    """Of kaggle.json and the two variables, which win over it."""
    names = {USER: "username", KEY: "key"}
    given = {names[it]: os.environ[it] for it in names if it in os.environ}
    for variable, name in names.items():
        if name in given:
            _check_letters(variable, given[name])
    if len(given) == 2:
        return f"{USER} and {KEY}"
    if not os.path.lexists(path):
        return ""
    value = _read_object(path)
    for name in names.values():
        if name not in given:
            if name not in value:
                raise ValueError(
                    f"{path}: has no {name!r}; {_HOW}, or set {USER} and {KEY}"
                )
            _check_letters(f"{path}: {name!r}", value[name])
    return str(path)


def _config_folder(home: Path) -> Path:
    if folder := os.environ.get("KAGGLE_CONFIG_DIR"):
        return Path(folder)
    if home.exists():
        return home
    other = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(other, "kaggle")


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(
            f"{path}: is not JSON ({error.msg}: {where}); {_HOW}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: is not JSON (too deep); {_HOW}") from None
    if not isinstance(value, dict):
        kind = TYPES.get(type(value), "a number")
        raise ValueError(  # noqa: TRY004 (what is wrong is the file)
            f"{path}: holds {kind}, not an object; {_HOW}"
        )
    return value


def _read_text(path: Path, name: str = "") -> str:
    say = f"the file that {name} names" if name else str(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "something else"
            raise ValueError(f"{say}: is {kind}, not a file")
        data = path.read_bytes()
    except OSError as error:
        words = "chmod 600 it" if isinstance(error, PermissionError) else _HOW
        raise ValueError(f"{say}: cannot be read ({error.strerror}); {words}") from None
    if data.startswith(BYTE_ORDER_MARKS):
        raise ValueError(
            f"{say}: begins with a byte order mark; save it as UTF-8 without one"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{say}: is not text in UTF-8; {_HOW}") from None
    if not text.strip():
        raise ValueError(f"{say}: is empty; {_HOW}")
    return text


def _check_letters(say: str, value: Any) -> None:
    """A name, a key or a token goes into a header: letters of ASCII that are seen."""
    if not isinstance(value, str):
        kind = TYPES.get(type(value), "null" if value is None else "a number")
        raise ValueError(  # noqa: TRY004 (what is wrong is the file)
            f"{say}: is {kind}, not text; {_HOW}"
        )
    if not value:
        raise ValueError(f"{say}: is empty; set it, or take it away")
    if not all("!" <= letter <= "~" for letter in value):
        raise ValueError(
            f"{say}: holds a space, a line end or another character that no key has; "
            "copy it again"
        )
