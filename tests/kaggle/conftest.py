"""A server on the loopback, and a build to publish to it with a clock that nobody waits for."""

import json
import tempfile

import pytest

from kit.kaggle import publish
from kit.kaggle.client import Clock
from tests.kaggle import builds
from tests.kaggle.session import KEY, USER, FakeClock
from tests.kaggle_stub import Kaggle


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """The server, with this process's client signed in and able to reach nothing else."""
    server = Kaggle()
    server.outputs = {"submission.csv": b"id,images\n0,1 2\n"}
    server.log = json.dumps(
        [{"stream_name": "stdout", "time": 1.0, "data": "ranked\n"}]
    )
    home = tmp_path / "home"
    home.mkdir()
    for name in (
        "KAGGLE_API_TOKEN",
        "KAGGLE_KERNEL_RUN_TYPE",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment(home, USER, KEY).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)  # the client keeps uploads in TMPDIR
    from kaggle.api.kaggle_api_extended import KaggleApi

    assert KaggleApi.args == ["--local"]  # read once, when the client is imported
    yield server
    server.close()


@pytest.fixture
def build(tmp_path):
    return builds.make(tmp_path / "build")


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def go(build, tmp_path, clock):
    """Publishes all of the build, or as asked; what it says is in `go.said`."""

    def run(**asked):
        asked = asked or {"datasets": True, "submit": "first"}
        return publish.publish(
            build,
            tmp_path / "out",
            **asked,
            clock=Clock(clock.now, clock.sleep),
            say=run.said.append,
        )

    run.said = []
    return run
