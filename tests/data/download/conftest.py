from pathlib import Path

import pytest

from kit.data.download import official
from kit.data.download.transfer import Client, Patience
from kit.data.toy import ToyConfig, render
from tests.gldv2_stub import Stub, offered, write_official

QUICK = Patience(tries=4, timeout=2.0, slowest=1000, pause=0.001, longest=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A small data folder in GLDv2's layout."""
    config = ToyConfig(landmarks=8, images=90, side=96)
    return render(tmp_path_factory.mktemp("download") / "toy", config, workers=1)


@pytest.fixture(scope="session")
def _offered(toy):
    return offered(toy)


@pytest.fixture
def server(_offered):
    with Stub(dict(_offered)) as stub:
        yield stub


@pytest.fixture
def source(server, tmp_path) -> official.Official:
    path = write_official(tmp_path / "official.json")
    return official.read(path, f"{server.url}/gl", f"{server.url}/gld/")


@pytest.fixture
def client() -> Client:
    return Client(QUICK)
