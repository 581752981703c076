import hashlib
import json
import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from kit.data.download.headers import Version, asked_wait, follows
from kit.data.download.transfer import Client, Failed, Patience, Stopped, Wrong
from tests.gldv2_stub import Fault, Stub, wait_for

DATA = random.Random(0).randbytes(300_000)
QUICK = Patience(tries=4, timeout=0.5, slowest=1000, pause=0.001, longest=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def stub():
    with Stub({"a.tar": DATA}) as stub:
        yield stub


def fetch(stub, tmp_path, check=None, how=QUICK):
    return Client(how).fetch(f"{stub.url}/a.tar", tmp_path / "in/a.tar", check)


def whole(path):
    """The file is there with the right bytes and nothing else is left."""
    assert path.read_bytes() == DATA
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return True


def test_a_file_comes_whole_and_is_not_asked_for_again(stub, tmp_path):
    assert whole(fetch(stub, tmp_path)) and whole(fetch(stub, tmp_path))
    assert stub.asked("a.tar") == [""]


def test_a_cut_goes_on_where_it_was(stub, tmp_path):
    stub.faults["a.tar"] = [Fault(keep=100_000), Fault(keep=50_000), Fault(keep=7)]
    assert whole(fetch(stub, tmp_path))
    begun = [int(r[6:-1]) for r in stub.asked("a.tar")[1:]]
    assert begun == [100_000, 150_000, 150_007]


def test_a_cut_goes_on_in_another_run(stub, tmp_path):
    once = Patience(tries=1, timeout=1)
    stub.faults["a.tar"] = [Fault(keep=100_000)]
    with pytest.raises(Failed, match="cut at byte 100000 of 300000"):
        fetch(stub, tmp_path, how=once)
    assert not (tmp_path / "in/a.tar").exists()
    assert whole(fetch(stub, tmp_path, how=once))
    assert stub.asked("a.tar")[1:] == ["bytes=100000-"]


def test_a_whole_part_is_not_asked_for_again(stub, tmp_path):
    def killed(path):
        raise KeyboardInterrupt  # between the last byte and the file's name

    with pytest.raises(KeyboardInterrupt):
        fetch(stub, tmp_path, killed)
    assert whole(fetch(stub, tmp_path))
    assert stub.asked("a.tar") == [""]


@pytest.mark.parametrize("how", ["If-Range", "wild", "shorter"])
def test_of_a_file_that_changed_in_between_no_byte_is_kept(stub, tmp_path, how):
    stub.faults["a.tar"] = [Fault(keep=100_000)]
    with pytest.raises(Failed):
        fetch(stub, tmp_path, how=Patience(tries=1))
    changed = DATA[::-1][: 90_000 if how == "shorter" else None]
    stub.files["a.tar"] = changed
    if how != "If-Range":  # the server does not compare the versions
        stub.faults["a.tar"] = [Fault(wild=True)] * 4
    assert fetch(stub, tmp_path).read_bytes() == changed
    anew = ["bytes=100000-"] if how == "If-Range" else ["bytes=100000-", ""]
    assert stub.asked("a.tar")[1:] == anew


def test_a_longer_file_of_the_same_time_is_another_one(stub, tmp_path):
    bare = {"ETag": ""}
    stub.faults["a.tar"] = [Fault(keep=100_000, headers=bare)]
    with pytest.raises(Failed):
        fetch(stub, tmp_path, how=Patience(tries=1))
    stub.files["a.tar"] = DATA[::-1] + b"more"
    stub.faults["a.tar"] = [Fault(wild=True, headers=bare)]
    assert fetch(stub, tmp_path).read_bytes() == DATA[::-1] + b"more"


@pytest.mark.parametrize(
    ("span", "tag", "expected"),
    [
        ("bytes 5-9/10", '"a"', True),
        ("bytes 5-9/*", '"a"', True),
        ("bytes 5-9/10", "", True),
        ("bytes 5-9/10", 'W/"b"', True),
        ("bytes 5-9/10", '"b"', False),
        ("bytes 5-9/11", '"a"', False),
        ("bytes 50-99/10", '"a"', False),
        ("bytes 4-9/10", '"a"', False),
        ("", '"a"', False),
    ],
)
def test_only_the_rest_of_the_same_file_follows(span, tag, expected):
    answer = SimpleNamespace(headers={"Content-Range": span, "ETag": tag})
    assert follows(answer, Version("", '"a"', 10), 5) is expected


def test_a_server_without_ranges_starts_anew(stub, tmp_path):
    stub.faults["a.tar"] = [Fault(keep=100_000), Fault(whole=True)]
    assert whole(fetch(stub, tmp_path))
    assert stub.asked("a.tar") == ["", "bytes=100000-"]


def test_a_server_without_ranges_that_always_cuts_is_given_up(stub, tmp_path):
    stub.faults["a.tar"] = [Fault(keep=100_000, whole=True)] * 50
    with pytest.raises(Failed, match="cut at byte 100000 of 300000; 4 tries"):
        fetch(stub, tmp_path)
    assert len(stub.asked("a.tar")) == 4


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_version_nothing_is_gone_on_with(stub, tmp_path, tag):
    bare = {"ETag": tag, "Last-Modified": ""}
    stub.faults["a.tar"] = [Fault(keep=100_000, headers=bare), Fault(headers=bare)]
    assert whole(fetch(stub, tmp_path))
    assert stub.asked("a.tar") == ["", ""]


def test_a_part_of_another_address_or_without_a_note_is_not_gone_on_with(
    stub, tmp_path
):
    stub.files["b.tar"] = DATA[::-1]
    for damage in ("address", "note"):
        stub.faults["a.tar"] = [Fault(keep=100_000)]
        with pytest.raises(Failed):
            fetch(stub, tmp_path, how=Patience(tries=1))
        if damage == "note":
            (tmp_path / "in/a.tar.part.json").write_text('{"url":')
            assert whole(fetch(stub, tmp_path))
        else:
            url = f"{stub.url}/b.tar"
            got = Client(QUICK).fetch(url, tmp_path / "in/a.tar")
            assert got.read_bytes() == DATA[::-1]
            got.unlink()


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(stub, tmp_path, status):
    stub.faults["a.tar"] = [Fault(status)] * 3
    assert whole(fetch(stub, tmp_path))
    stub.faults["a.tar"] = [Fault(status)] * 9
    (tmp_path / "in/a.tar").unlink()
    with pytest.raises(Failed, match=f"HTTP {status}; 4 tries"):
        fetch(stub, tmp_path)


@pytest.mark.parametrize(
    ("status", "absent"), [(404, True), (403, True), (410, True), (400, False)]
)
def test_what_is_not_there_is_asked_for_once(stub, tmp_path, status, absent):
    stub.faults["a.tar"] = [Fault(status)] * 9
    with pytest.raises(Failed, match=f"^HTTP {status}$") as caught:
        fetch(stub, tmp_path)
    assert caught.value.absent is absent and len(stub.asked("a.tar")) == 1


def test_pauses_double_up_to_the_longest_and_obey_the_server(monkeypatch, tmp_path):
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    how = Patience(tries=6, pause=1.0, longest=5.0, obeyed=50.0)
    with Stub({"a.tar": DATA}) as stub:
        faults = [Fault(503)] * 4 + [Fault(429, {"Retry-After": "30"})] + [Fault(503)]
        stub.faults["a.tar"] = faults
        client = Client(how, Event())
        with pytest.raises(Failed):
            client.fetch(f"{stub.url}/a.tar", tmp_path / "a.tar")
        stub.faults["a.tar"] = [Fault(429, {"Retry-After": "4000"})]
        client.fetch(f"{stub.url}/a.tar", tmp_path / "a.tar")
    for wait, most in zip(waits, (1, 2, 4, 5), strict=False):
        assert most / 2 <= wait <= most
    assert waits[4:] == [30, 50]


def test_retry_after_may_be_a_moment():
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    assert 95 < asked_wait(moment) <= 100
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100))
    assert asked_wait(past) == 0.0 == asked_wait("soon") == asked_wait(None)
    assert asked_wait(" 7 ") == 7.0


@pytest.mark.parametrize("fault", [Fault(keep=5000, hang=True), Fault(drip=0.01)])
def test_a_server_that_hardly_says_anything_is_left_and_asked_again(
    stub, tmp_path, fault
):
    stub.faults["a.tar"] = [fault]
    assert whole(fetch(stub, tmp_path))
    assert int(stub.asked("a.tar")[1][6:-1]) > 0


def test_a_wrong_copy_is_fetched_anew_but_not_for_ever(stub, tmp_path):
    def check(path):
        if hashlib.md5(path.read_bytes()).digest() != hashlib.md5(DATA).digest():
            raise Wrong("MD5 is another")

    bad = Fault(body=b"x" * len(DATA))
    stub.faults["a.tar"] = [bad] * 2
    assert whole(fetch(stub, tmp_path, check))
    (tmp_path / "in/a.tar").write_bytes(b"damaged since")
    stub.faults["a.tar"] = [bad] * 9
    with pytest.raises(Failed, match="MD5 is another; 3 times"):
        fetch(stub, tmp_path, check)
    assert not (tmp_path / "in/a.tar").exists()
    assert len(stub.asked("a.tar")) == 6


def test_an_empty_copy_is_a_wrong_one(stub, tmp_path):
    def check(path):
        if path.read_bytes() != DATA:
            raise Wrong("MD5 is another")

    stub.faults["a.tar"] = [Fault(body=b"")] * 2
    assert whole(fetch(stub, tmp_path, check))


def test_a_chunked_answer_is_whole_where_it_ends(stub, tmp_path):
    cut = Fault(chunked=True, keep=100_000)
    stub.faults["a.tar"] = [cut, Fault(chunked=True)]
    assert whole(fetch(stub, tmp_path))
    assert stub.asked("a.tar") == [
        "",
        "",
    ]  # of what length a rest would be nobody knows


def test_without_a_length_nothing_is_believed(stub, tmp_path):
    stub.faults["a.tar"] = [Fault(headers={"Content-Length": ""})]
    with pytest.raises(Failed, match="does not say how long"):
        fetch(stub, tmp_path)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y", "nothing", "http://[x/", "data:,x", ""]
)
def test_only_http_is_asked(url, tmp_path):
    with pytest.raises(Failed, match="no address"):
        Client(QUICK).fetch(url, tmp_path / "x")


def test_a_redirect_to_a_file_is_not_followed(stub, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    for target in (tmp_path.as_uri() + "/secret", "ftp://127.0.0.1/x"):
        stub.faults["a.tar"] = [Fault(302, {"Location": target})] * 9
        with pytest.raises(Failed):
            fetch(stub, tmp_path)


def test_nobody_there_is_said_after_all_tries(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a"
    with pytest.raises(Failed, match="refused; 4 tries"):
        Client(QUICK).fetch(url, tmp_path / "a")


def test_a_small_file_is_read_whole_or_not_at_all(stub):
    stub.files["md5"] = b"x" * 100
    client, url = Client(QUICK), f"{stub.url}/md5"
    stub.faults["md5"] = [Fault(keep=50), Fault(503)]
    assert client.read(url, 100) == b"x" * 100
    with pytest.raises(Failed, match="more than 99 bytes"):
        client.read(url, 99)


def test_sizes_come_without_the_file(stub):
    client = Client(QUICK)
    assert client.size(f"{stub.url}/a.tar") == 300_000
    assert client.size(f"{stub.url}/none") is None
    assert stub.asked("a.tar") == []


def test_a_stop_ends_the_transfer_and_what_came_is_gone_on_with(stub, tmp_path):
    stop, failures = threading.Event(), []
    stub.faults["a.tar"] = [Fault(drip=0.001)]
    client = Client(Patience(), stop)

    def work():
        try:
            client.fetch(f"{stub.url}/a.tar", tmp_path / "a.tar")
        except Stopped as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: stub.asked("a.tar"))
    time.sleep(0.1)
    stop.set()
    thread.join(5)
    assert failures and not thread.is_alive()
    part = tmp_path / "a.tar.part"
    assert DATA.startswith(part.read_bytes())
    assert json.loads((tmp_path / "a.tar.part.json").read_text())["size"] == 300_000


def test_the_meter_hears_of_every_byte(stub, tmp_path):
    counts = []
    Client(QUICK, meter=counts.append).fetch(f"{stub.url}/a.tar", tmp_path / "a")
    assert sum(counts) == len(DATA)
