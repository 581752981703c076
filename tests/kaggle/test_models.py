"""Networks as a Kaggle model: their card and folders, and publishing them to the loopback."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from kit.answers import gain_table
from kit.kaggle import card, check, manifest, publish
from kit.kaggle.client import KaggleError
from kit.models import net as nets
from tests.kaggle import builds
from tests.kaggle.session import KEY, ROOT, script
from tests.kaggle_stub import Fault

SEEN = {"a" * 64: "clean", "b" * 64: "c2x | more"}
GAINS = [("raw", 0.25, 0.5, ""), ("reranked", 0.3125, 0.625, "3 s")]
MODEL = "alice/toy-embeddings"
C2X, CLEAN = f"{MODEL}/pyTorch/c2x-full", f"{MODEL}/pyTorch/clean"
WRITES = {
    *("StartBlobUpload", "PUT", "CreateModel", "CreateModelInstance"),
    "CreateModelInstanceVersion",
}
NETWORK = "MODEL_FRAMEWORK_PY_TORCH"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two networks, clean and c2x/full, and the gains of their run."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name in ("clean", "c2x/full"):
        nets.save(nets.build(nets.NetConfig("test_resnet", dim=8)), folder / name, SEEN)
    gain_table.write(folder / "gains.csv", GAINS)
    return folder


def packed(runs, out, **changed):
    how = {"user": "alice", "name": "toy-embeddings", "gains": runs / "gains.csv"}
    return card.folder(runs, "toy", ("clean", "c2x/full"), out, **how | changed)


@pytest.fixture
def build(tmp_path, runs):
    made = builds.make(tmp_path / "build")
    packed(runs, made / manifest.MODEL)
    manifest.write(made, builds.COMPETITION)
    return made


# the folders


def test_a_variation_is_a_folder_that_loads_as_the_network_it_was(runs, tmp_path):
    out = packed(runs, tmp_path / "model")
    assert sorted(path.name for path in out.iterdir()) == [
        *("c2x-full", "clean", "model-metadata.json")
    ]
    for name, variation in (("clean", "clean"), ("c2x/full", "c2x-full")):
        assert nets.describe(out / variation) == nets.describe(runs / name)
        ours, theirs = (
            nets.load(it).state_dict() for it in (out / variation, runs / name)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_take_no_second_space_and_the_runs_are_left_alone(runs, tmp_path):
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    out = packed(runs, tmp_path / "model")
    packed(runs, tmp_path / "model")  # again
    weights = out / "clean/model.safetensors"
    assert weights.samefile(runs / "clean/model.safetensors")
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before


def test_a_card_says_lists_hashes_numbers_licence_and_how_to_load(runs, tmp_path):
    out = packed(runs, tmp_path / "model")
    text = (out / "c2x-full/README.md").read_text()
    about = nets.describe(runs / "c2x/full")
    for line in (
        "# c2x/full of toy",
        f"| clean | `{'a' * 64}` |",
        f"| c2x \\| more | `{'b' * 64}` |",
        "| raw | 0.2500 | 0.5000 |  |",
        "| reranked | 0.3125 | 0.6250 | 3 s |",
        f"| weights | SHA-256 `{about['hash']}` |",
        f'model = net.load("kaggle:{C2X}/VERSION")  # or the folder\'s path',
    ):
        assert line in text.splitlines(), line
    assert "Attribution 4.0 International (CC BY 4.0), of the weights." in text


def test_a_card_without_numbers_or_lists_says_so(runs):
    about = nets.describe(runs / "clean") | {"seen": {}}
    text = card.card(about, "toy", "clean", "kaggle:x", [], "mit")
    assert "Not measured." in text and "None: it is not trained." in text
    assert "mAP" not in text


def test_the_front_matter_is_what_the_hub_reads(runs, tmp_path):
    out = packed(runs, tmp_path / "model", licence="apache-2.0", gains=None)
    card_data = pytest.importorskip("huggingface_hub").ModelCard.load(
        out / "clean/README.md"
    )
    assert card_data.data.license == "apache-2.0"
    assert card_data.data.library_name == "landmark-kit"
    assert "image-retrieval" in card_data.data.tags
    assert card_data.text.lstrip().startswith("# clean of toy")


def test_the_code_of_a_card_runs(runs, tmp_path):
    out = packed(runs, tmp_path / "model")
    text = (out / "clean/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace(f"kaggle:{CLEAN}/VERSION", str(out / "clean"))
    shown = "import torch\nimages = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)\n"
    command = [sys.executable, "-c", f"{shown}{code}\nprint(*vectors.shape)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 8\n"


@pytest.mark.parametrize(
    ("names", "changed", "said"),
    [
        (
            ("clean",),
            {"licence": "gpl"},
            "licence 'gpl' is not one of apache-2.0, cc-by",
        ),
        ((), {}, "are none, or two make one variation"),
        (("clean", "CLEAN"), {}, "are none, or two make one variation"),
    ],
)
def test_what_makes_no_model_is_refused(runs, tmp_path, names, changed, said):
    how = {"user": "alice", "name": "toy-embeddings"} | changed
    with pytest.raises(ValueError, match=said):
        card.folder(runs, "toy", names, tmp_path / "model", **how)
    assert not (tmp_path / "model").exists()


# the build


def test_a_model_is_no_dataset_and_its_folders_have_parts(build):
    assert [path.name for path in manifest.datasets(build)] == ["features", "weights"]
    for folder in manifest.variations(build):
        parts = manifest.read_parts(folder / manifest.PARTS)
        names = [part.path for part in parts]
        assert names == ["README.md", "model.json", "model.safetensors"]
    assert check.problems(build) == []


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("model-metadata.json", {"slug": "abc"}, "model: slug 'abc' is not 6 to 50"),
        ("model-metadata.json", {"title": "abc"}, "model: title 'abc' is not 6 to 50"),
        ("model-metadata.json", {"titel": "a"}, "unknown field 'titel' (close: title)"),
        (
            "clean/model-instance-metadata.json",
            {"modelSlug": "another"},
            "model/clean: is a variation of alice/another, not of alice/toy-embeddings",
        ),
        (
            "clean/model-instance-metadata.json",
            {"instanceSlug": "unclean"},
            "model/clean: instanceSlug 'unclean' is not a slug that is its folder's name",
        ),
        (
            "clean/model-instance-metadata.json",
            {"licenseName": ""},
            "model/clean: licenseName must be written",
        ),
    ],
)
def test_metadata_that_kaggle_would_refuse_is_named(build, path, fields, said):
    builds.change(build / manifest.MODEL / path, **fields)
    manifest.write(build, builds.COMPETITION)
    assert any(said in line for line in check.problems(build))


def test_files_of_a_variation_that_would_be_left_out_are_named(build):
    folder = build / manifest.MODEL / "clean"
    (folder / "kernel-metadata.json").write_text("{}")
    (folder / "more").mkdir()
    manifest.write(build, builds.COMPETITION)
    found = check.problems(build)
    assert "model/clean: kernel-metadata.json would be left out; rename it" in found
    assert any(
        line.startswith("model/clean: more/ would be left out") for line in found
    )
    (folder / manifest.VARIATION).unlink()
    assert any(
        "model-instance-metadata.json is missing" in it for it in check.problems(build)
    )


# publishing


def test_models_are_made_with_every_field_and_file(kaggle, go, build):
    done = go(model=True)
    assert done == publish.Published(models={C2X: 1, CLEAN: 1})
    (made,) = kaggle.bodies("CreateModel")
    assert made.pop("description").startswith(
        "Networks of recipe toy, one a variation."
    )
    assert made == {
        "ownerSlug": "alice",
        "slug": "toy-embeddings",
        "title": "toy embeddings",
        "subtitle": "Image embeddings of recipe toy",
        "isPrivate": True,
    }
    first, second = kaggle.bodies("CreateModelInstance")
    assert {
        "ownerSlug": "alice",
        "modelSlug": "toy-embeddings",
    }.items() <= first.items()
    assert second["body"].pop("usage").startswith("# clean of toy\n")
    assert len(second["body"].pop("files")) == 4
    assert second["body"] == {
        "instanceSlug": "clean",
        "framework": NETWORK,
        "overview": "clean of recipe toy",
        "licenseName": "Attribution 4.0 International (CC BY 4.0)",
        "fineTunable": True,
        "trainingData": ["c2x | more", "clean"],
    }
    assert {it["type"] for it in kaggle.bodies("StartBlobUpload")} == {"MODEL"}
    ((held,),) = (kaggle.models[MODEL][NETWORK, "clean"],)
    folder = build / manifest.MODEL / "clean"
    sent = {p.name: p.read_bytes() for p in folder.iterdir()}
    sent.pop(manifest.VARIATION)
    assert held == sent
    assert not kaggle.datasets and not kaggle.kernels


def test_a_second_publish_sends_nothing_and_a_change_only_what_changed(
    kaggle, go, build
):
    go(model=True)
    kaggle.requests.clear()
    assert go(model=True).models == {C2X: 1, CLEAN: 1}
    assert not WRITES & set(kaggle.methods())
    path = build / manifest.MODEL / "clean/README.md"
    path.write_bytes(path.read_bytes()[::-1])  # as long as before
    manifest.write(build, builds.COMPETITION)
    assert go(model=True).models == {C2X: 1, CLEAN: 2}
    (version,) = kaggle.bodies("CreateModelInstanceVersion")
    assert len(version["body"].pop("files")) == 4
    assert version == {
        "ownerSlug": "alice",
        "modelSlug": "toy-embeddings",
        "framework": NETWORK,
        "instanceSlug": "clean",
        "body": {"versionNotes": "published by landmark-kit"},
    }


def test_a_version_that_is_told_late_is_waited_for(kaggle, go, build, clock):
    go(model=True)
    (build / manifest.MODEL / "clean/README.md").write_bytes(b"changed")
    manifest.write(build, builds.COMPETITION)
    kaggle.late = 3
    assert go(model=True).models == {C2X: 1, CLEAN: 2}
    assert clock.naps == [2, 3, 4.5]


def test_more_files_than_a_page_holds_are_all_verified(kaggle, go):
    kaggle.page = 2
    go(model=True)
    kaggle.requests.clear()
    go(model=True)
    assert not WRITES & set(kaggle.methods())


def test_models_go_along_with_datasets_and_the_kernel(kaggle, go):
    done = go(model=True, datasets=True, submit="first")
    assert done.models == {C2X: 1, CLEAN: 1}
    assert len(done.datasets) == 2 and done.public_score == "0.5123"


@pytest.mark.parametrize("method", sorted(WRITES - {"PUT", "StartBlobUpload"}))
@pytest.mark.parametrize("lost", [Fault(drop=True, done=True), Fault(500, done=True)])
def test_an_answer_that_is_lost_makes_nothing_twice(kaggle, go, build, method, lost):
    if method == "CreateModelInstanceVersion":
        go(model=True)
        (build / manifest.MODEL / "clean/README.md").write_bytes(b"changed")
        manifest.write(build, builds.COMPETITION)
    kaggle.faults[method] = [lost]
    version = 2 if method == "CreateModelInstanceVersion" else 1
    assert go(model=True).models[CLEAN] == version
    assert len(kaggle.models[MODEL][NETWORK, "clean"]) == version


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept these credentials"), (500, "no, said")]
)
@pytest.mark.parametrize("method", ["CreateModel", "CreateModelInstance"])
def test_an_error_that_stays_is_one_line(kaggle, go, method, status, words):
    body = {"code": status, "message": f"no, said the server to {KEY}"}
    kaggle.faults[method] = [Fault(status, body)] * 20
    with pytest.raises(KaggleError, match=words) as told:
        go(model=True)
    assert "\n" not in str(told.value) and KEY not in str(told.value)


@pytest.mark.parametrize("method", ["CreateModel", "CreateModelInstance"])
def test_an_error_with_status_200_is_an_error(kaggle, go, method):
    kaggle.faults[method] = [Fault(200, {"error": "slug is taken", "errorCode": 409})]
    with pytest.raises(KaggleError, match=f"model {MODEL}.*: slug is taken"):
        go(model=True)


def test_a_part_that_goes_missing_on_the_way_is_named(kaggle, go):
    kaggle.lost = {"model.safetensors"}
    with pytest.raises(
        KaggleError, match=r"version 1: model.safetensors has 0 bytes, not"
    ):
        go(model=True)
    assert go(model=True).models[C2X] == 2  # is mended by the next run


def test_an_upload_that_breaks_off_is_gone_on_with(kaggle, go, build):
    size = (build / manifest.MODEL / "clean/model.safetensors").stat().st_size
    kaggle.faults["PUT"] = [Fault(503, least=size, keep=size // 2)]
    assert go(model=True).models == {C2X: 1, CLEAN: 1}


def test_a_build_without_models_says_how_to_have_them(kaggle, go, build):
    shutil.rmtree(build / manifest.MODEL)
    manifest.write(build, builds.COMPETITION)
    with pytest.raises(KaggleError, match="build again with the models"):
        go(model=True)


def test_the_script_publishes_models_and_plans_them(kaggle, build):
    said = script(kaggle, build, "--dry-run")
    assert f"model {CLEAN}: sent with --model, unless it is there" in said.stdout
    assert not kaggle.requests
    done = script(kaggle, build, "--model")
    assert done.returncode == 0, done.stderr
    assert f"model {CLEAN}: version 1 is there, every part verified" in done.stdout
    assert KEY not in done.stdout + done.stderr


def test_kaggle_s_own_client_takes_the_folders(kaggle, build):
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    assert api.model_create_new(str(build / manifest.MODEL)).id
    assert api.model_instance_create(
        str(build / manifest.MODEL / "clean"), quiet=True
    ).id
    assert list(kaggle.models[MODEL]) == [(NETWORK, "clean")]
