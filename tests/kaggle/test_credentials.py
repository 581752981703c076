"""Credentials that are there and of no use are named; no message repeats one."""

import json

import pytest

from kit.kaggle import credentials
from kit.kaggle.client import Client, Clock, KaggleError

KEY = "5ecre7-0123456789abcdef"
GOOD = {"username": "alice", "key": KEY}
ENCODED = json.dumps(GOOD).encode()


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (credentials.TOKEN, credentials.USER, credentials.KEY):
        monkeypatch.delenv(name, raising=False)
    for name in ("KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kaggle").mkdir()
    return tmp_path / ".kaggle"


def refused():
    with pytest.raises(KaggleError) as told:
        Client(Clock(), print)
    text = str(told.value)
    assert "5ecre7" not in text and "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xef\xbb\xbf" + ENCODED, "byte order mark"),
        (json.dumps(GOOD).encode("utf-16"), "byte order mark"),
        (ENCODED[:-1], "not JSON"),
        (ENCODED[:25], "not JSON"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xe9" + ENCODED, "not text in UTF-8"),
        (f"alice {KEY}".encode(), "not JSON"),
        (json.dumps([GOOD]).encode(), "holds a list"),
        (json.dumps(KEY).encode(), "holds text"),
        (b"7", "holds a number"),
        (b"[" * 100_000, "not JSON"),
        (json.dumps({"username": "alice"}).encode(), "no 'key'"),
        (json.dumps({"key": KEY}).encode(), "no 'username'"),
        (json.dumps(GOOD | {"key": 17}).encode(), "'key': is a number"),
        (json.dumps(GOOD | {"key": [KEY]}).encode(), "'key': is a list"),
        (json.dumps(GOOD | {"key": None}).encode(), "'key': is null"),
        (json.dumps(GOOD | {"key": ""}).encode(), "'key': is empty"),
        (json.dumps(GOOD | {"key": f"{KEY}\n"}).encode(), "'key': holds a space"),
        (json.dumps(GOOD | {"username": "al ice"}).encode(), "'username': holds"),
    ],
)
def test_a_kaggle_json_that_is_of_no_use_is_named(home, content, words):
    (home / "kaggle.json").write_bytes(content)
    text = refused()
    assert str(home / "kaggle.json") in text and words in text


@pytest.mark.parametrize("name", ["kaggle.json", "access_token", "access_token.txt"])
def test_a_folder_and_a_link_to_nothing_are_named(home, name):
    (home / name).mkdir()
    assert f"{home / name}: is a folder" in refused()
    (home / name).rmdir()
    (home / name).symlink_to(home / "gone")
    assert f"{home / name}: cannot be read (No such file" in refused()


def test_a_file_that_may_not_be_read_is_named(home, monkeypatch):
    (home / "kaggle.json").write_bytes(ENCODED)

    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(credentials.Path, "read_bytes", deny)
    text = refused()
    assert "kaggle.json: cannot be read (Permission denied); chmod 600" in text


@pytest.mark.parametrize(
    "content, words",
    [
        (f"5ecre7 {KEY}".encode(), "holds a space"),
        (f"{KEY}\n{KEY}\n".encode(), "holds a space"),
        (b"\xef\xbb\xbf" + KEY.encode(), "byte order mark"),
        (b"", "is empty"),
        (f"{KEY}\x00".encode(), "holds a space"),
        ("5ecre7é".encode(), "holds a space"),
    ],
)
def test_a_token_that_is_of_no_use_is_named(home, monkeypatch, content, words):
    (home / "access_token").write_bytes(content)
    text = refused()
    assert str(home / "access_token") in text and words in text
    monkeypatch.setenv(credentials.TOKEN, str(home / "access_token"))
    text = refused()
    assert "file that KAGGLE_API_TOKEN names" in text and words in text


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"KAGGLE_API_TOKEN": f"{KEY}\n"}, "KAGGLE_API_TOKEN: holds a space"),
        ({"KAGGLE_API_TOKEN": f" {KEY}"}, "KAGGLE_API_TOKEN: holds a space"),
        ({"KAGGLE_API_TOKEN": "/5ecre7/gone"}, "names a file that is not there"),
        ({"KAGGLE_USERNAME": "alice", "KAGGLE_KEY": f"{KEY}\r\n"}, "KAGGLE_KEY: holds"),
        ({"KAGGLE_USERNAME": "alice", "KAGGLE_KEY": ""}, "KAGGLE_KEY: is empty"),
        ({"KAGGLE_USERNAME": "alice"}, "no Kaggle credentials"),
        ({}, "no Kaggle credentials"),
    ],
)
def test_variables_that_are_of_no_use_are_named(home, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((KaggleError, ValueError)) as told:
        place = credentials.check_credentials()
        raise ValueError(place or credentials.ABSENT)
    assert words in str(told.value) and "5ecre7" not in str(told.value)


def test_the_place_that_the_client_takes_is_found(home, monkeypatch):
    (home / "credentials.json").write_text(json.dumps({"refresh_token": KEY}))
    assert credentials.check_credentials() == str(home / "credentials.json")
    (home / "kaggle.json").write_bytes(ENCODED)
    assert credentials.check_credentials() == str(home / "kaggle.json")
    (home / "access_token").write_text(f"{KEY}\n")
    assert credentials.check_credentials() == str(home / "access_token")
    monkeypatch.setenv(credentials.TOKEN, KEY)
    assert credentials.check_credentials() == credentials.TOKEN


def test_a_broken_file_does_not_matter_where_the_variables_say_all(home, monkeypatch):
    (home / "kaggle.json").write_bytes(ENCODED[:9])
    monkeypatch.setenv(credentials.USER, "alice")
    monkeypatch.setenv(credentials.KEY, KEY)
    assert credentials.check_credentials() == "KAGGLE_USERNAME and KAGGLE_KEY"
