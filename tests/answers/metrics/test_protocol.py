import numpy as np
import pytest

from kit import files
from kit.answers.metrics import protocol
from kit.data.lists import StoredList
from kit.features import store
from kit.rerank.chain import Chain
from kit.rerank.steps import build

ABOUT = {
    "size": 512,
    "template": "bounded",
    "scales": [0.70710678, 1.0],
    "flip": True,
    "normalise": False,
}


def saved(folder, name, rows, seen, about=ABOUT):
    """A store of zeros, complete."""
    ids = np.char.mod("i%05d", np.arange(rows)).astype("U16")
    model = {"name": folder.name, "hash": "e" * 64}
    facts = {"model": model, "list": {"name": name, "hash": name[0] * 64}, "seen": seen}
    done = store.create(folder / name, ids, 4, 512, facts | about)
    for block in range(len(done)):
        count = min(512, rows - block * 512)
        store.Writer(folder / name).write(block, np.ones((count, 4), np.float16))
    store.finish(folder / name)


@pytest.fixture
def features(tmp_path):
    for model, seen in (("c2x", {"a" * 64: "clean", "b" * 64: "c2x"}), ("bare", {})):
        saved(tmp_path / model, "query", 3, seen)
        saved(tmp_path / model, "index", 1234, seen)
    return tmp_path


def test_one_line_tells_all_that_a_number_was_measured_with(features):
    steps = (build({"step": "alpha_qe", "neighbours": 7}), build({"step": "diffusion"}))
    told = protocol.describe(
        *(features, Chain({"c2x": 1.0}, steps), "query", "index", "gnd.pkl 1234abcd"),
        *(1129,),
        crop=protocol.CROPPED,
        distractors=1_001_001,
    )
    assert str(told) == (
        "ground truth gnd.pkl 1234abcd; "
        "index index iiiiiiii, 1,234 images and 1,001,001 distractors; "
        "queries 1,129 cropped; trained on clean aaaaaaaa, c2x bbbbbbbb; "
        "images 512 px bounded scales 0.7071 1 flip; "
        f"rerank {steps[0]}; {steps[1]} (networks c2x 1)"
    )
    assert "neighbours" in str(steps[0]) and "\n" not in str(told)


def test_a_part_of_gldv2_is_told_from_all_of_it(features):
    def index(whole):
        chain = Chain({"bare": 0.5, "c2x": 1.0})
        found = protocol.describe(
            features, chain, "query", "index", "t", 3, whole=whole
        )
        assert found.trained == "clean aaaaaaaa, c2x bbbbbbbb"
        assert found.chain == "none (networks bare 0.5, c2x 1)"
        return found.index

    assert index(1234) == "index iiiiiiii, 1,234 images"
    part = "index iiiiiiii, 1,234 of 761,757 images (not all of GLDv2)"
    assert index(761_757) == part


def test_an_untrained_network_has_met_nothing(features):
    found = protocol.describe(features, Chain({"bare": 1.0}), "query", "index", "t", 3)
    assert found.trained == "nothing" and found.voters == ""


def test_the_references_that_vote_are_named(features, tmp_path):
    voters = StoredList("index_train_holdout", tmp_path / "x.csv", "c" * 64)
    found = protocol.describe(
        features, Chain({"bare": 1.0}), "query", "index", "t", 3, voters=voters
    )
    assert "; references index_train_holdout cccccccc; rerank none" in str(found)


def test_networks_that_look_otherwise_are_all_told(features):
    about = ABOUT | {"size": 448, "template": "S2", "scales": [1.0], "flip": False}
    saved(features / "other", "query", 2, {}, about | {"normalise": True})
    chain = Chain({"bare": 1.0, "other": 1.0, "c2x": 1.0})
    found = protocol.describe(features, chain, "query", "index", "t", 3)
    assert found.seen == (
        "512 px bounded scales 0.7071 1 flip and 448 px S2 scales 1 normalise"
    )


def test_a_ground_truth_is_named_by_its_file_and_content(tmp_path):
    path = tmp_path / "retrieval_solution_v2.1.csv"
    path.write_text("id,images,Usage\n")
    told = protocol.file(path)
    assert told == f"retrieval_solution_v2.1.csv {files.sha256(path)[:8]}"
    path.write_text("id,images,Usage\nq,a,Public\n")
    assert protocol.file(path) != told


def test_beside_lists_it_has_the_name_of_its_source(tmp_path):
    for name in ("solution.csv", "recognition.csv"):
        (tmp_path / name).write_text(f"{name}\n")
    sha = files.sha256(tmp_path / "solution.csv")[:8]
    assert protocol.of_lists(tmp_path) == f"solution.csv {sha}"
    sources = {
        "test/retrieval_solution_v2.1.csv": 3,
        "test/recognition_solution_v2.1.csv": 4,
        "test/test.csv": 9,
    }
    files.write_json(tmp_path / "query.json", {"sources": sources})
    assert protocol.of_lists(tmp_path) == f"retrieval_solution_v2.1.csv {sha}"
    sha = files.sha256(tmp_path / "recognition.csv")[:8]
    found = protocol.of_lists(tmp_path, "recognition.csv")
    assert found == f"recognition_solution_v2.1.csv {sha}"
