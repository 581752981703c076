"""Publishing, by Kaggle's unmodified client, to a server on the loopback that misbehaves."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kit import files, pipeline
from kit.kaggle import client, kernels, manifest
from kit.kaggle.client import KaggleError
from tests.kaggle import builds
from tests.kaggle.session import KEY, ROOT, USER, script
from tests.kaggle_stub import Fault

WEIGHTS, FEATURES = "alice/landmark-weights", "alice/landmark-features"
SUBMISSION = "alice/landmark-submission"
WRITES = {
    *("StartBlobUpload", "PUT", "CreateDataset", "CreateDatasetVersion"),
    *("SaveKernel", "CreateCodeSubmission"),
}
ERRORS = [
    (401, "Kaggle does not accept these credentials"),
    (403, "not allowed"),
    (404, "there is no such thing"),
    (409, "409: no, said the server"),
    (429, "too many requests"),
    (500, "500: no, said the server"),
]


def cli(*arguments):
    """The `kaggle` executable."""
    command = [Path(sys.executable).with_name("kaggle"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def no(status):
    body = {"code": status, "message": "no, said the server"}
    return Fault(status, body, {"Retry-After": "0"})


# the whole way


def test_a_build_is_published_from_datasets_to_score(kaggle, go, build, tmp_path):
    done = go()
    assert done.datasets == {WEIGHTS: 1, FEATURES: 1}
    assert done.kernel == f"{SUBMISSION}/1"
    assert (done.public_score, done.private_score) == ("0.5123", "0.4987")
    held = kaggle.datasets[FEATURES][0]
    for name in ("part-0.bin", "part-1.bin", "ids.bin", "parts.json"):
        assert held.pop(name) == (build / "features" / name).read_bytes()
    assert not held
    assert (tmp_path / "out/submission.csv").read_bytes() == b"id,images\n0,1 2\n"
    assert (tmp_path / "out/landmark-submission.log").read_text() == "ranked\n"
    order = [it for it in dict.fromkeys(kaggle.methods()) if it in WRITES]
    made = ["StartBlobUpload", "PUT", "CreateDataset", "SaveKernel"]
    assert order == [*made, "CreateCodeSubmission"]


def test_the_notebook_tells_first_and_sends_when_it_is_told_to(
    kaggle, build, tmp_path, capfd
):
    parameters = {"build": str(build), "output": str(tmp_path / "out")}
    notebook = ROOT / "notebooks" / "06_publish.ipynb"
    dry = pipeline.Step("06_publish", notebook, parameters)
    pipeline.run([dry], tmp_path / "work" / "dry")
    assert kaggle.methods() == []
    assert f"kernel {SUBMISSION}: on NvidiaTeslaT4" in capfd.readouterr().out
    wet = replace(dry, parameters=parameters | {"dry_run": False, "submit": "first"})
    pipeline.run([wet], tmp_path / "work" / "wet")
    assert "CreateCodeSubmission" in kaggle.methods()
    assert "score: public 0.5123, private 0.4987" in capfd.readouterr().out
    assert (tmp_path / "out/submission.csv").read_bytes() == b"id,images\n0,1 2\n"
    for path in (tmp_path / "work").rglob("*.ipynb"):
        assert KEY not in path.read_text()


def test_every_field_that_is_sent(kaggle, go, build):
    go()
    (create,) = (it for it in kaggle.bodies("CreateDataset") if "weights" in it["slug"])
    tokens = [it.pop("token") for it in create["files"]]
    assert len(set(tokens)) == 3 and create.pop("files") == [{}] * 3
    assert create == {
        "ownerSlug": "alice",
        "slug": "landmark-weights",
        "title": "Landmark weights",
        "licenseName": "CC0-1.0",
        "isPrivate": True,
    }
    starts = {it["name"]: it for it in kaggle.bodies("StartBlobUpload")}
    start = starts["model.safetensors"]
    assert start.pop("lastModifiedEpochSeconds") > 1e9
    assert start == {
        "type": "DATASET",
        "name": "model.safetensors",
        "contentLength": 5000,
    }
    (save,) = kaggle.bodies("SaveKernel")
    notebook = json.loads(save.pop("text"))
    assert save == {
        "slug": SUBMISSION,
        "newTitle": "Landmark submission",
        "language": "python",
        "kernelType": "notebook",
        "datasetDataSources": [f"{WEIGHTS}/1", f"{FEATURES}/1"],
        "competitionDataSources": [builds.COMPETITION],
        "isPrivate": True,
        "enableGpu": True,
        "enableTpu": False,
        "enableInternet": False,
        "machineShape": "NvidiaTeslaT4",
    }
    assert tuple(it["source"] for it in notebook["cells"]) == builds.SOURCES
    (submit,) = kaggle.bodies("CreateCodeSubmission")
    assert submit == {
        "competitionName": builds.COMPETITION,
        "kernelOwner": "alice",
        "kernelSlug": "landmark-submission",
        "kernelVersion": 1,
        "fileName": "submission.csv",
        "submissionDescription": "first (version 1)",
    }
    status = kaggle.bodies("GetKernelSessionStatus")[0]
    assert status == {
        "userName": "alice",
        "kernelSlug": "landmark-submission",
        "versionLabel": "v1",
    }


def test_the_build_is_not_modified(kaggle, go, build):
    before = {p: p.read_bytes() for p in build.rglob("*") if p.is_file()}
    go()
    assert {p: p.read_bytes() for p in build.rglob("*") if p.is_file()} == before


def test_a_second_publish_asks_and_pushes_nothing(kaggle, go):
    first = go()
    kaggle.requests.clear()
    assert go() == first
    assert not WRITES & set(kaggle.methods())


def test_only_the_dataset_with_a_changed_part_is_sent_again(kaggle, go, build):
    go()
    kaggle.requests.clear()
    path = build / "weights" / "model.json"
    path.write_bytes(path.read_bytes()[::-1])  # as long as before
    manifest.write(build, builds.COMPETITION)
    done = go()
    assert done.datasets == {WEIGHTS: 2, FEATURES: 1}
    sent = {it["name"] for it in kaggle.bodies("StartBlobUpload")}
    assert sent == {"model.json", "model.safetensors", "parts.json"}
    (save,) = kaggle.bodies("SaveKernel")  # for what it attaches has changed
    assert save["datasetDataSources"] == [f"{WEIGHTS}/2", f"{FEATURES}/1"]
    assert done.kernel == f"{SUBMISSION}/2"


def test_a_kernel_edited_on_the_site_is_pushed_again(kaggle, go):
    go()
    there = kaggle.kernels[SUBMISSION].request
    there["text"] = there["text"].replace("ranking", "something else")
    assert go().kernel == f"{SUBMISSION}/2"


def test_a_kernel_is_not_pushed_on_other_datasets_than_the_build_has(kaggle, go, build):
    with pytest.raises(KaggleError, match="features: is not on Kaggle; .*--datasets"):
        go(kernel=True)
    go()
    (build / "features" / "ids.bin").write_bytes(b"others")
    manifest.write(build, builds.COMPETITION)
    with pytest.raises(KaggleError, match="features: differs from the build"):
        go(kernel=True)
    assert len(kaggle.bodies("SaveKernel")) == 1


def test_datasets_alone_leave_the_kernel_alone(kaggle, go):
    assert go(datasets=True).kernel == ""
    assert not {"GetKernel", "SaveKernel"} & set(kaggle.methods())


def test_more_files_than_a_page_holds_are_all_verified_and_fetched(
    kaggle, go, tmp_path
):
    kaggle.page = 2
    kaggle.outputs |= {f"figures/{n}.txt": b"%d" % n for n in range(5)}
    go()
    assert (tmp_path / "out/figures/4.txt").read_bytes() == b"4"


def test_an_output_that_would_leave_its_folder_is_refused(kaggle, go, tmp_path):
    kaggle.outputs = {"../stolen.csv": b"x"}
    with pytest.raises(KaggleError, match="'../stolen.csv' is .* leads elsewhere"):
        go()
    assert not (tmp_path / "stolen.csv").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "is empty"),
        ("a\x00b", "cannot be shown"),
        ("a\x1b]0;t\x07", "cannot be shown"),
        ("a\nb", "cannot be shown"),
        ("n" * 300, "longer than"),
        ("é" * 101, "longer than"),
        ("..", "leads elsewhere"),
        ("a/../../b", "leads elsewhere"),
        ("/b", "absolute"),
        ("a//b", "is empty"),
        ("./b", "leads elsewhere"),
        ("b/", "is empty"),
        ("landmark-submission.log", "name of its log"),
        ("submission.csv/b", "lies in another file"),
        ("link/b", "would leave"),
    ],
)
def test_a_name_that_is_no_file_of_the_folder_is_refused(
    kaggle, go, tmp_path, name, words
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "home")
    kaggle.outputs = {"submission.csv": b"x", name: b"y"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KaggleError, match=words) as told:
        go(datasets=True, kernel=True)
    assert repr(name)[1:9] in str(told.value) and str(told.value).isprintable()
    left = [it for it in sorted(tmp_path.rglob("*")) if it not in before]
    assert [it for it in left if it.is_relative_to(out)] == []
    assert not [it for it in left if it.name == "b"]


def test_an_output_that_is_listed_twice_is_refused(kaggle, go):
    page = {"files": [{"fileName": "a", "url": "http://localhost/output/a"}] * 2}
    kaggle.faults["ListKernelSessionOutput"] = [Fault(200, page)]
    with pytest.raises(KaggleError, match="'a' stands there twice"):
        go(datasets=True, kernel=True)


def test_a_full_disk_is_named_and_leaves_nothing(kaggle, go, tmp_path, monkeypatch):
    def full(self, answer, most):
        yield b"id"
        raise OSError(28, "No space left on device")

    go(datasets=True)
    monkeypatch.setattr(client.Client, "receive", full)
    monkeypatch.setattr(client.Client, "receive_small", lambda self, it: it.content)
    with pytest.raises(
        (KaggleError, OSError), match=r"out/submission\.csv.*No space left"
    ):
        go(kernel=True)
    assert [it for it in (tmp_path / "out").rglob("*") if it.is_file()] == []


def test_nothing_that_a_terminal_obeys_is_said(kaggle, go):
    harm = "\x1b]52;c;aGVsbG8=\x07\x9b2J\x08\u202e safe"
    go(datasets=True)
    kaggle.log = json.dumps([{"data": f"{harm} line {n}\n"} for n in range(3)])
    kaggle.kernel_states = ["ERROR"]
    for failure in ("", f"cause {harm}"):
        kaggle.failure = failure
        with pytest.raises(KaggleError) as told:
            go(kernel=True, again=True)
        assert str(told.value).isprintable() and "safe" in str(told.value)
    for method, fault in {
        "SaveKernel": Fault(200, {"error": f"no {harm}"}),
        "GetKernel": Fault(400, {"code": 400, "message": f"no {harm}"}),
    }.items():
        kaggle.faults[method] = [fault]
        with pytest.raises(KaggleError) as told:
            go(kernel=True, again=True)
        assert str(told.value).isprintable() and "safe" in str(told.value)
    assert any("line 2" in it for it in go.said)
    assert all(it.isprintable() for it in go.said)


def test_a_key_that_a_log_breaks_into_lines_is_not_shown(kaggle, go):
    kaggle.log = json.dumps([{"data": f"key {KEY[:9]}\n{KEY[9:]} was it\n"}])
    kaggle.kernel_states = ["ERROR"]
    with pytest.raises(KaggleError) as told:
        go(datasets=True, kernel=True)
    for text in (*go.said, str(told.value)):
        assert KEY[:9] not in text and KEY[9:] not in text


def test_a_kernel_without_a_submission_file_is_not_submitted(kaggle, go):
    kaggle.outputs = {"notes.txt": b"x"}
    with pytest.raises(KaggleError, match=r"wrote no submission\.csv"):
        go()
    assert not kaggle.submissions


# answers that are errors


@pytest.mark.parametrize(
    "method", ["StartBlobUpload", "CreateDataset", "SaveKernel", "CreateCodeSubmission"]
)
@pytest.mark.parametrize("status, words", ERRORS)
def test_an_error_that_stays_is_one_line_and_nothing_more_is_pushed(
    kaggle, go, method, status, words
):
    kaggle.faults[method] = [no(status)] * 60
    with pytest.raises(KaggleError) as told:
        go()
    assert words in str(told.value) and "\n" not in str(told.value)
    order = [it for it in dict.fromkeys(kaggle.methods()) if it in WRITES]
    assert order[-1] == method
    tries = {429: 6, 500: 6}.get(status, 1)
    if method != "StartBlobUpload":  # which the client repeats by itself
        assert len(kaggle.bodies(method)) == tries


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers_is_asked_again(kaggle, go, clock, status):
    body = {"code": status, "message": "later"}
    later = Fault(status, body, {"Retry-After": "7"} if status == 429 else {})
    for method in WRITES - {"PUT", "CreateDatasetVersion", "StartBlobUpload"}:
        kaggle.faults[method] = [later, later]
    go()
    assert clock.naps[:2] == ([7, 7] if status == 429 else [2, 4])
    assert len(kaggle.datasets) == 2 and len(kaggle.submissions) == 1
    assert kaggle.kernels[SUBMISSION].version == 1


@pytest.mark.parametrize(
    "method", ["CreateDataset", "CreateDatasetVersion", "SaveKernel"]
)
@pytest.mark.parametrize("lost", [Fault(drop=True, done=True), Fault(500, done=True)])
def test_an_answer_that_is_lost_does_not_push_twice(kaggle, go, build, method, lost):
    if method == "CreateDatasetVersion":
        go(datasets=True)
        (build / "weights" / "model.json").write_bytes(b"changed")
        manifest.write(build, builds.COMPETITION)
    kaggle.faults[method] = [lost]
    done = go()
    version = 2 if method == "CreateDatasetVersion" else 1
    assert done.datasets[WEIGHTS] == len(kaggle.datasets[WEIGHTS]) == version
    assert kaggle.kernels[SUBMISSION].version == 1


def test_a_submission_whose_answer_is_lost_is_entered_once(kaggle, go):
    kaggle.faults["CreateCodeSubmission"] = [Fault(drop=True, done=True)]
    assert go().public_score == "0.5123"
    assert len(kaggle.submissions) == 1


def test_a_repeated_push_that_is_lost_is_not_taken_for_the_one_before(kaggle, go):
    go()
    kaggle.faults["SaveKernel"] = [Fault(drop=True)]
    assert go(kernel=True, again=True).kernel == f"{SUBMISSION}/2"


@pytest.mark.parametrize("method", ["CreateDataset", "SaveKernel", "GetKernel"])
def test_a_lost_question_is_asked_again(kaggle, go, method):
    kaggle.faults[method] = [Fault(drop=True)]
    go()
    assert kaggle.kernels[SUBMISSION].version == 1


def test_an_error_in_a_good_answer_is_an_error(kaggle, go):
    kaggle.faults["CreateDataset"] = [
        Fault(200, {"status": "error", "error": "title is in use"})
    ]
    with pytest.raises(KaggleError, match="features: title is in use"):
        go()
    kaggle.faults["SaveKernel"] = [Fault(200, {"error": "Kernel is too large"})]
    with pytest.raises(KaggleError, match="submission: Kernel is too large"):
        go()
    assert len(kaggle.bodies("SaveKernel")) == 1
    kaggle.faults["CreateCodeSubmission"] = [Fault(200, {"message": "daily limit"})]
    with pytest.raises(KaggleError, match="submit: daily limit"):
        go()


@pytest.mark.parametrize("kind", ["Dataset", "Competition", "Kernel", "Model"])
def test_sources_that_were_not_attached_are_an_error(kaggle, go, kind):
    answer = {"versionNumber": 1, f"invalid{kind}Sources": ["some/thing"]}
    kaggle.faults["SaveKernel"] = [Fault(200, answer)]
    with pytest.raises(KaggleError, match=f"not attach {kind.lower()} some/thing"):
        go()
    assert "GetKernelSessionStatus" not in kaggle.methods()


def test_a_kernel_that_lacks_a_source_is_not_taken_for_this_one(kaggle, go):
    go()
    kaggle.kernels[SUBMISSION].request["datasetDataSources"].pop()
    assert go().kernel == f"{SUBMISSION}/2"


# uploads


def test_an_upload_broken_off_goes_on_where_it_was(kaggle, go, build):
    kaggle.faults["PUT"] = [Fault(503, least=5000, keep=2000)]
    go(datasets=True)
    puts = [it for it in kaggle.requests if it.method == "PUT"]
    (at,) = (n for n, it in enumerate(puts) if len(it.body) == 2000)
    question, rest = puts[at + 1 : at + 3]
    assert question.headers["Content-Range"] == "bytes */5000" and not question.body
    assert rest.headers["Content-Range"] == "bytes 2000-4999/5000"
    content = (build / "weights" / "model.safetensors").read_bytes()
    assert rest.body == content[2000:]
    assert kaggle.datasets[WEIGHTS][0]["model.safetensors"] == content


def test_a_connection_dropped_in_an_upload_leaves_a_whole_file(kaggle, go, build):
    kaggle.faults["PUT"] = [Fault(drop=True, keep=50)]
    go(datasets=True)
    # eight files, and after the dropped one a question how much of it arrived
    assert kaggle.methods().count("PUT") == 9
    for name in ("features", "weights"):
        for part, content in kaggle.datasets[f"alice/landmark-{name}"][0].items():
            assert content == (build / name / part).read_bytes()


def test_a_killed_publish_goes_on_where_the_upload_was(kaggle, build, go):
    content = bytes(range(256)) * 4000
    (build / "features" / "part-0.bin").write_bytes(content)
    manifest.write(build, builds.COMPETITION)
    stuck = threading.Event()
    size = len(content)
    kaggle.faults["PUT"] = [Fault(least=size, keep=100_000, hang=stuck)]
    command = [sys.executable, ROOT / "scripts" / "publish.py", build, "--datasets"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert stuck.wait(20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go(datasets=True)
    starts = [it["name"] for it in kaggle.bodies("StartBlobUpload")]
    assert starts.count("part-0.bin") == 1
    puts = [it for it in kaggle.requests if it.method == "PUT"]
    span = f"bytes 100000-{size - 1}/{size}"
    assert span in [it.headers.get("Content-Range") for it in puts]
    assert kaggle.datasets[FEATURES][0]["part-0.bin"] == content


def test_a_file_that_fails_once_is_sent_again(kaggle, go):
    kaggle.faults["PUT"] = [Fault(500)]
    assert go(datasets=True).datasets == {WEIGHTS: 1, FEATURES: 1}
    assert len(kaggle.datasets[FEATURES][0]) == 4


def test_a_file_that_never_arrives_makes_no_dataset(kaggle, go):
    kaggle.faults["PUT"] = [Fault(500)] * 99
    with pytest.raises(KaggleError, match=r"ids\.bin, part-0\.bin, .* did not arrive"):
        go(datasets=True)
    assert not kaggle.datasets


def test_an_expired_upload_begins_anew(kaggle, go):
    kaggle.expired = {"blob1", "blob3"}
    go(datasets=True)
    assert len(kaggle.datasets[FEATURES][0]) == 4


def test_a_file_rebuilt_within_the_second_is_not_mixed_with_its_old_upload(
    kaggle, go, build
):
    path = build / "features" / "part-0.bin"
    stamp = path.stat().st_mtime
    kaggle.faults["CreateDataset"] = [no(400)]
    with pytest.raises(KaggleError):
        go(datasets=True)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (stamp, stamp))
    manifest.write(build, builds.COMPETITION)
    os.utime(build / "features" / manifest.PARTS, (stamp, stamp))
    go(datasets=True)
    assert kaggle.datasets[FEATURES][0]["part-0.bin"] == path.read_bytes()


def test_a_dataset_refused_after_its_upload_is_not_uploaded_again(kaggle, go):
    kaggle.faults["CreateDataset"] = [no(400)]
    with pytest.raises(KaggleError):
        go(datasets=True)
    sent = len(kaggle.bodies("StartBlobUpload"))
    kaggle.requests.clear()
    go(datasets=True)
    assert sent == 4 and len(kaggle.bodies("StartBlobUpload")) == 3
    assert len([it for it in kaggle.bodies("PUT") if it]) == 3


def test_a_part_that_silently_goes_missing_stops_the_publish(kaggle, go):
    kaggle.lost = {"part-1.bin"}
    with pytest.raises(
        KaggleError, match=r"features version 1: part-1\.bin is missing"
    ):
        go()
    assert "SaveKernel" not in kaggle.methods()
    assert go().datasets[FEATURES] == 2  # the next one repairs it


def test_a_part_of_another_size_or_build_stops_the_publish(kaggle, go, build):
    held = [("ids.bin", 99), ("part-0.bin", 3000), ("part-1.bin", 3000), ("old.bin", 5)]
    held.append(("parts.json", (build / "features" / "parts.json").stat().st_size))
    rows = [{"name": name, "totalBytes": size} for name, size in held]
    kaggle.faults["ListDatasetFiles"] = [Fault(200, {"datasetFiles": rows})]
    words = r"old\.bin is not of this build; ids\.bin has 99 bytes, not 100$"
    with pytest.raises(KaggleError, match=words):
        go()
    assert "SaveKernel" not in kaggle.methods()


# waiting


def test_a_dataset_is_waited_for_until_it_is_ready(kaggle, go, clock):
    kaggle.dataset_states = ["BLOBS_RECEIVED", "BLOBS_COPIED_TO_SDS", "READY"]
    go(datasets=True)
    assert clock.naps == [2, 3, 2, 3]


def test_the_version_before_is_not_taken_for_the_new_one(kaggle, go, build):
    go(datasets=True)
    (build / "weights" / "model.json").write_bytes(b"changed")
    manifest.write(build, builds.COMPETITION)
    old = Fault(200, {"currentVersionNumber": 1})
    kaggle.faults["GetDataset"] = [old, old, old]  # the last after the new version
    assert go(datasets=True).datasets == {FEATURES: 1, WEIGHTS: 2}


def test_a_dataset_that_is_still_processed_is_not_sent_twice(kaggle, go):
    go(datasets=True)
    kaggle.dataset_states_of[FEATURES] = ["BLOBS_RECEIVED", "READY"]
    go(datasets=True)
    assert len(kaggle.datasets[FEATURES]) == 1


def test_a_dataset_that_kaggle_cannot_process_is_an_error_and_then_replaced(kaggle, go):
    kaggle.dataset_states = ["FAILED"]
    with pytest.raises(KaggleError, match="could not process version 1"):
        go(datasets=True)
    kaggle.dataset_states = ["READY"]
    assert go(datasets=True).datasets[FEATURES] == 2


def test_six_hours_in_the_queue_are_waited_for(kaggle, go, clock):
    go(datasets=True)
    clock.naps.clear()
    start = clock.seconds
    kaggle.kernel_states = lambda: (
        "QUEUED" if clock.seconds - start < 6 * 3600 else "COMPLETE"
    )
    go()
    assert 6 * 3600 <= sum(clock.naps) < 6 * 3600 + 2 * 60 + 10
    assert clock.naps[:3] == [2, 3, 4.5] and max(clock.naps) == 60
    assert len(kaggle.bodies("SaveKernel")) == 1


def test_a_wait_has_a_limit(kaggle, go, clock, monkeypatch):
    monkeypatch.setattr(client, "LIMIT", 7200)
    kaggle.kernel_states = ["QUEUED"]
    with pytest.raises(KaggleError, match="not finished after 2 h"):
        go()
    assert 7200 < clock.seconds < 7400


def test_an_instantly_ready_server_is_done_with_in_two_minutes(kaggle, go, clock):
    kaggle.kernel_states = kaggle.submission_states = ["COMPLETE"]
    go()
    assert clock.seconds < 120


def test_taken_gpu_sessions_are_waited_for(kaggle, go, clock):
    busy = Fault(200, {"error": f"{kernels.BUSY} of 2 reached."})
    kaggle.faults["SaveKernel"] = [busy] * 7
    go()
    waits = [nap for nap in clock.naps if nap >= 30]
    assert waits == [30, 60, 120, 240, 480, 600, 600]
    assert kaggle.kernels[SUBMISSION].version == 1


def test_taken_gpu_sessions_are_not_waited_for_without_end(kaggle, go, clock):
    kaggle.faults["SaveKernel"] = [
        Fault(200, {"error": f"{kernels.BUSY} of 2 reached."})
    ] * 999
    with pytest.raises(KaggleError, match="Maximum batch GPU session count of 2"):
        go()
    assert clock.seconds < 14 * 3600


def test_a_server_that_asks_for_a_day_gets_ten_minutes(kaggle, go, clock):
    day = Fault(429, {"code": 429, "message": "later"}, {"Retry-After": "86400"})
    kaggle.faults["GetDatasetStatus"] = [day]
    go(datasets=True)
    assert clock.naps == [600]


def test_polling_survives_a_server_that_stumbles(kaggle, go):
    kaggle.faults["GetKernelSessionStatus"] = [no(500), Fault(drop=True), no(429)]
    kaggle.faults["GetSubmission"] = [no(502), Fault(drop=True)]
    go()
    assert len(kaggle.bodies("SaveKernel")) == 1


# ends that are not good


def test_a_kernel_that_fails_shows_the_end_of_its_log(kaggle, go):
    lines = [f"line {n}\n" for n in range(100)] + ["CUDA error: no kernel image\n"]
    events = [{"stream_name": "stderr", "time": 1.0, "data": it} for it in lines]
    kaggle.log, kaggle.failure = json.dumps(events), "Notebook threw an exception"
    kaggle.kernel_states = ["RUNNING", "ERROR"]
    with pytest.raises(KaggleError, match="version 1 ended in error: Notebook threw"):
        go()
    shown = [line.strip() for line in go.said if line.startswith("  ")]
    assert shown[-1] == "CUDA error: no kernel image"
    assert shown[-kernels.LOG_LINES] == "line 81"
    assert not any("line 80" in line for line in shown)
    with pytest.raises(KaggleError, match="ended in error"):
        go()
    assert len(kaggle.bodies("SaveKernel")) == 1 and not kaggle.submissions
    kaggle.kernel_states = ["COMPLETE"]
    assert go(kernel=True, again=True).kernel == f"{SUBMISSION}/2"


def test_a_kernel_that_was_cancelled_is_an_error(kaggle, go):
    kaggle.kernel_states = ["CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED"]
    with pytest.raises(KaggleError, match="version 1 was cancelled"):
        go()


def test_a_submission_that_fails_is_an_error(kaggle, go):
    kaggle.submission_states = ["PENDING", "ERROR"]
    kaggle.failure = "Submission Scoring Error"
    with pytest.raises(KaggleError, match="failed: Submission Scoring Error"):
        go()


def test_no_credentials_are_one_line(kaggle, go, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(
        KaggleError, match="^no Kaggle credentials; set KAGGLE_API_TOKEN"
    ):
        go()
    assert capsys.readouterr() == ("", "") and not kaggle.requests


def test_a_token_is_used_as_such_and_not_shown(kaggle, go, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_0123456789abcdef")
    kaggle.faults["IntrospectToken"] = [
        Fault(401, {"code": 401, "message": "KGAT_0123456789abcdef has expired"})
    ]
    with pytest.raises(KaggleError, match=r"signing in: 401: \*\*\* has expired"):
        go(datasets=True)
    kaggle.requests.clear()
    go(datasets=True)
    assert kaggle.bodies("IntrospectToken")[0] == {"token": "KGAT_0123456789abcdef"}
    (start, *_) = (it for it in kaggle.requests if it.method == "StartBlobUpload")
    assert start.headers["Authorization"] == "Bearer KGAT_0123456789abcdef"


def test_a_client_that_is_not_installed_is_one_line(kaggle, go, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", None)
    with pytest.raises(KaggleError, match="^no kaggle client .*; pip install kaggle"):
        go()


def test_a_dataset_that_was_deleted_needs_another_slug(kaggle, go):
    go(datasets=True)
    kaggle.dataset_states_of[WEIGHTS] = ["DELETED"]
    with pytest.raises(KaggleError, match="weights: was deleted on Kaggle; choose"):
        go(datasets=True)
    assert len(kaggle.bodies("CreateDataset")) == 2


# what a user sees


def test_credentials_are_never_shown_or_written(kaggle, build, tmp_path, go):
    pair = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
    echo = f"bad Authorization: Basic {pair} of key {KEY}"
    seen = []
    for method in ("StartBlobUpload", "SaveKernel", "GetKernelSessionStatus"):
        kaggle.faults[method] = [Fault(400, {"code": 400, "message": echo})]
        done = script(kaggle, build, "--datasets", "--kernel")
        assert done.returncode == 1
        assert "bad Authorization: Basic *** of key ***" in done.stderr
        seen.append(done.stdout + done.stderr)
    kaggle.faults.clear()
    kaggle.log, kaggle.failure = echo, echo
    go(kernel=True, again=True)
    kaggle.kernel_states = ["ERROR"]
    with pytest.raises(KaggleError) as told:
        go(kernel=True, again=True)
    error = told.value
    assert error.__suppress_context__ or error.__context__ is None
    seen += [str(error), *go.said]
    kaggle.kernel_states = ["COMPLETE"]
    kaggle.submission_states = ["ERROR"]
    with pytest.raises(KaggleError) as told:
        go(submit="second", again=True)
    seen.append(str(told.value))
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "out" / "landmark-submission.log") in paths
    seen += [path.read_bytes().decode(errors="replace") for path in paths]
    seen += [str(it) for it in kaggle.bodies("SaveKernel")]
    for text in seen:
        assert KEY not in text and pair not in text


def test_the_script_ends_with_one_line_and_an_exit_code(kaggle, build):
    done = script(kaggle, build)
    assert done.returncode == 2 and "nothing to do" in done.stderr
    kaggle.kernel_states = kaggle.submission_states = ["COMPLETE"]
    kaggle.faults["SaveKernel"] = [Fault(200, {"error": "Kernel is too large"})]
    done = script(kaggle, build, "--datasets", "--kernel")
    assert done.returncode == 1
    line = "publish: kernel alice/landmark-submission: Kernel is too large\n"
    assert done.stderr == line and "version 1 is ready" in done.stdout
    done = script(kaggle, build, "--submit", "by hand")
    assert done.returncode == 0 and done.stderr == ""
    assert "score: public 0.5123" in done.stdout
    assert (build.with_name("build-output") / "submission.csv").exists()


def test_the_script_refuses_a_build_before_it_asks_anyone(kaggle, build):
    builds.change(build / "submission/kernel-metadata.json", machine_shape=None)
    done = script(kaggle, build, "--datasets", "--kernel")
    assert done.returncode == 1 and "machine_shape is None" in done.stderr
    assert not kaggle.requests


def test_a_dry_run_asks_nobody_and_needs_no_credentials(kaggle, build):
    done = script(kaggle, build, "--dry-run", KAGGLE_KEY="")
    assert done.returncode == 0 and not kaggle.requests
    assert f"dataset {WEIGHTS}" in done.stdout and "in all" in done.stdout
    assert "NvidiaTeslaT4, without internet" in done.stdout


def test_a_server_that_is_away_is_one_line(kaggle, go, clock):
    kaggle.close()
    with pytest.raises(KaggleError, match="dataset .*: no answer") as told:
        go()
    assert "\n" not in str(told.value) and clock.naps == [2, 4, 8, 16, 32]


# the executable, on the same server


def test_the_kaggle_executable_pushes_the_submission_folder(kaggle, build, go):
    go(datasets=True)
    rc, text = cli("kernels", "push", "-p", build / "submission")
    assert rc == 0 and "Kernel version 1 successfully pushed" in text
    (save,) = kaggle.bodies("SaveKernel")
    assert save["datasetDataSources"] == [WEIGHTS, FEATURES]
    assert save["enableInternet"] is False
    assert save["machineShape"] == "NvidiaTeslaT4"
    rc, text = cli("kernels", "status", SUBMISSION)
    assert rc == 0 and "KernelWorkerStatus.QUEUED" in text
    rc, text = cli("kernels", "logs", SUBMISSION)
    assert rc == 0 and "ranked" in text
    rc, _ = cli("kernels", "output", SUBMISSION, "-p", build.parent / "fetched")
    assert (build.parent / "fetched/submission.csv").read_bytes().startswith(b"id,")
    arguments = [builds.COMPETITION, "-k", SUBMISSION, "-v", "1", "-m", "by hand"]
    rc, _ = cli("competitions", "submit", *arguments, "-f", "submission.csv")
    assert rc == 0
    assert kaggle.bodies("CreateCodeSubmission")[0]["kernelVersion"] == 1


def test_publish_finds_what_the_executable_made(kaggle, build, go):
    for name in ("weights", "features"):
        rc, text = cli("datasets", "create", "-p", build / name)
        assert rc == 0 and "is being created" in text
    assert go(datasets=True).datasets == {WEIGHTS: 1, FEATURES: 1}
    assert len(kaggle.bodies("CreateDataset")) == 2
    rc, text = cli("datasets", "version", "-p", build / "weights", "-m", "again")
    assert rc == 0 and len(kaggle.datasets[WEIGHTS]) == 2
    assert go(datasets=True).datasets == {WEIGHTS: 2, FEATURES: 1}


def test_the_executable_hides_what_publish_says(kaggle, build, go):
    go(datasets=True)
    kaggle.faults["SaveKernel"] = [Fault(200, {"error": "Kernel is too large"})] * 2
    rc, _ = cli("kernels", "push", "-p", build / "submission")
    assert rc == 0  # which is why exit codes are not trusted
    with pytest.raises(KaggleError, match="too large"):
        go()
    assert files.read_json(build / manifest.MANIFEST)["competition"]
