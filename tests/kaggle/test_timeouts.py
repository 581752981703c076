"""Publishing to a server that stalls, trickles, repeats itself or ends too soon: it ends, too."""

import time
from collections import defaultdict

import pytest

from kit.kaggle.client import Clock, KaggleError
from kit.kaggle.server import Server
from kit.kaggle.timeouts import Limits
from tests.kaggle_stub import Fault

LIMITS = Limits(silence=0.25, call=0.6, pace=1e6, pages=20)
FAULTS = {
    "never answers": Fault(silent=True),
    "stalls": Fault(cut=3),
    "a byte now and then": Fault(cut=3, pause=0.1),
    "ends too soon": Fault(cut=3, early=True),
}


def whole(**asked):
    return {"datasets": True, "kernel": True, "limits": LIMITS} | asked


@pytest.mark.parametrize("method", ["GetKernelSessionStatus", "GET"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_call_that_never_ends_is_an_error_and_leaves_nothing(
    kaggle, go, tmp_path, method, fault
):
    kaggle.outputs = {"submission.csv": b"id,images\n" * 1000}
    kaggle.faults[method] = [fault] * 99
    start = time.monotonic()
    with pytest.raises(KaggleError, match="no answer"):
        go(**whole())
    assert time.monotonic() - start < 20
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "method", ["GetDatasetStatus", "StartBlobUpload", "SaveKernel", "GET"]
)
def test_a_call_that_fails_in_any_such_way_is_repeated(kaggle, go, tmp_path, method):
    content = b"id,images\n" * 1000
    kaggle.outputs = {"submission.csv": content}
    kaggle.faults[method] = list(FAULTS.values())
    go(**whole())
    assert (tmp_path / "out/submission.csv").read_bytes() == content
    assert len(kaggle.datasets) == 2 and len(kaggle.bodies("SaveKernel")) <= 4


def test_an_upload_that_nobody_answers_is_an_error(kaggle, go):
    kaggle.faults["PUT"] = [Fault(silent=True)] * 999
    start = time.monotonic()
    with pytest.raises(KaggleError, match="upload: no answer"):
        go(datasets=True, limits=LIMITS)
    assert time.monotonic() - start < 20 and not kaggle.datasets


def test_a_token_that_nobody_looks_at_is_an_error(kaggle, go, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_0123456789abcdef")
    kaggle.faults["IntrospectToken"] = [Fault(silent=True)] * 99
    with pytest.raises(KaggleError, match="signing in: no answer"):
        go(datasets=True, limits=LIMITS)


@pytest.mark.parametrize(
    "tokens, words",
    [
        (["1"] * 9, "repeats the page '1'"),
        (["1", "2"] * 9, "repeats the page '1'"),
        (list(map(str, range(1, 99))), "more than 20 pages"),
    ],
    ids=["the same", "two in turn", "always another"],
)
@pytest.mark.parametrize("listed", ["dataset", "model", "output"])
def test_pages_without_end_are_an_error(kaggle, go, tokens, words, listed):
    go(datasets=True, kernel=True)
    kaggle.models["alice/m"] = defaultdict(lambda: [{}])
    kaggle.tokens = iter(tokens)
    server = Server(Clock(), print, LIMITS)
    ask = {
        "dataset": lambda: server.dataset_files("alice/landmark-weights", 1),
        "model": lambda: server.variation_files("alice/m/pyTorch/v", 1),
        "output": lambda: server.kernel_output("alice/landmark-submission", 1),
    }[listed]
    with pytest.raises(KaggleError, match=words):
        ask()


@pytest.mark.parametrize("said", [5, 50_000])
def test_an_output_of_another_length_than_announced_is_refused(
    kaggle, go, tmp_path, said
):
    kaggle.outputs = {"submission.csv": b"id,images\n" * 1000}
    kaggle.faults["GET"] = [Fault(said=said)] * 9
    with pytest.raises(KaggleError, match=r"submission\.csv: .*bytes came"):
        go(**whole())
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
