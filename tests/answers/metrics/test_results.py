import numpy as np
import pandas as pd
import pytest

from kit import files
from kit.answers.metrics import definitions, results
from kit.answers.metrics.protocol import Protocol
from kit.answers.metrics.revisited import LABELS

(SETUP,) = LABELS.values()
PROTOCOL = Protocol("t", "i", "3 whole", "nothing", "32 px", "none")


def measured(rankings, positives, own=None):
    """rankings: of each query what stands at each place: a hit or not; the own image is "self"."""
    placed = [
        {
            "same": np.array(
                [n for n, what in enumerate(row) if what is True]
                + [-1] * (count - sum(what is True for what in row)),
                int,
            ),
            "self": np.array([n for n, what in enumerate(row) if what == "self"], int),
        }
        for row, count in zip(rankings, positives, strict=True)
    ]
    names = [f"q{number}" for number in range(len(rankings))]
    return results.measure(names, own or names, placed, SETUP, [[n] for n in names])


@pytest.mark.parametrize("length", [4, 99, 100, 150])
def test_measures_are_those_of_the_definitions_without_the_query_s_own_image(length):
    random = np.random.default_rng(length)
    rankings, hits, positives = [], [], []
    for query in range(6):
        found = random.random(length) < 0.2
        row = found.tolist()
        row.insert(random.integers(length + 1), "self")
        rankings.append(row)
        hits.append(np.pad(found, (0, 200))[:100])
        positives.append(int(found.sum()) + query)
    table = measured(rankings, positives).per_query
    some = np.array(positives) > 0
    assert table["query"].tolist() == [f"q{n}" for n in np.flatnonzero(some)]
    for name, definition in definitions.DEFINITIONS.items():
        expected = definition(np.array(hits)[some], np.array(positives)[some])
        np.testing.assert_allclose(table[name], expected)


def test_the_official_map_comes_first_and_every_number_has_its_definition():
    found = measured([[True, False]], [1])
    assert found.measures[0].startswith("mAP@100, official")
    lines = found.lines("mine")
    assert lines[0].startswith("mine mAP@100, official: precisions at hits / min(")
    assert all("per query 1.0000 [" in line and "per class" in line for line in lines)


def test_classes_count_the_same_where_that_is_asked_and_are_redrawn_whole():
    values, classes = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1])
    assert results.class_mean(values, classes, False) == (0.75, 0.0, 1.0)
    assert results.class_mean(values, classes, True) == (0.5, 0.0, 1.0)
    same = results.class_mean(values, np.zeros(4, int), False)
    assert same == (0.75, 0.75, 0.75)  # one class has no spread


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    found = measured([[True], [False, True]], [1, 2])
    about = results.write(found, "mine", PROTOCOL, tmp_path)
    again = files.read_json(about)["measures"][results.OFFICIAL]["per_query"]
    assert again["mean"] == found.mean(results.OFFICIAL).mean
    assert len(pd.read_csv(tmp_path / "per_query.csv")) == 2
    monkeypatch.setattr(files, "write_json", None)  # killed before the last file
    with pytest.raises(TypeError):
        results.write(found, "mine", PROTOCOL, tmp_path)
    assert not about.exists()


def test_a_table_in_which_nothing_can_be_found_has_no_number(tmp_path):
    found = measured([[False]], [0])
    about = results.write(found, "mine", PROTOCOL, tmp_path)
    measures = files.read_json(about)["measures"]
    assert measures and all(
        mean is None for means in measures.values() for mean in means.values()
    )
    assert "NaN" not in about.read_text()
    assert found.lines("mine") == [
        "mine: no query has an image to find, nothing is measured"
    ]
