"""The page of a cleaning: whole by itself, with what decided it and examples of each outcome."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from kit.answers.cleaning import calibrate, rule, votes
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Rule
from kit.answers.cleaning.votes import Vote
from kit.report import cleaning
from tests.answers.cleaning.conftest import image_list, near, stored, walked


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Labelled]:
    """3 landmarks of 10 images, of which the last two are strange; one image alone, one broken."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.r_[np.repeat([0, 1, 2], 10), 3]
    vectors = np.eye(16)[labels] + rng.normal(size=(31, 16)) / 20
    strange = np.r_[np.tile(np.arange(10) > 7, 3), True]
    vectors[strange] = rng.normal(size=(7, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    paths = [f"{number}.png" for number in range(31)]
    for path in paths:
        cv2.imwrite(str(folder / path), rng.integers(0, 255, (20, 30, 3), np.uint8))
    (folder / "3.png").write_bytes(b"no picture")
    return folder, Labelled(image_list(labels, paths=paths), near(vectors, 25))


def words(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", markup.split("<body", 1)[-1]))


def titles(markup: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", markup)


def test_votes_make_a_page_that_is_whole_by_itself(given, tmp_path):
    data, labelled = given
    poll = votes.by_votes(labelled, Vote(5), Rule())
    sections = cleaning.decided(Rule(), poll=poll)
    path = cleaning.write(
        tmp_path / "page.html", labelled, poll.kept, data, sections, poll, Rule()
    )
    markup = path.read_text()
    assert titles(markup) == ["Outcome", "Votes", "Dropped", "Kept", "Alone"]
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', markup)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in markup
    text = words(markup)
    assert f"{poll.kept.images.sum()} of 31 images stay" in text
    assert f"{poll.least:.3f} is enough" in text and "only say which" not in text
    for row in np.flatnonzero(poll.kept.dropped["not confirmed"]):
        about = labelled.images.rows.iloc[row]
        told = f"{about['id']} · landmark {about['landmark_id']} · agreement "
        assert told + f"{poll.agreement[row]:.3f}" in text


def test_a_neighbour_is_a_hit_where_it_bears_the_label(given):
    _, labelled = given
    poll = votes.by_votes(labelled, Vote(5), Rule())
    rows = np.arange(31)
    for row, beside in zip(rows, cleaning._nearest(labelled, rows, poll), strict=True):
        assert beside.rows.tolist() == labelled.graph.rows[row, :8].tolist()
        same = labelled.labels[beside.rows] == labelled.labels[row]
        assert beside.hits.tolist() == same.tolist()
        first = beside.rows[0]
        landmark = labelled.images.rows["landmark_id"].iloc[first]
        told = f"{labelled.graph.scores[row, 0]:.2f} · {landmark}"
        assert beside.labels[0] == told


def test_inliers_make_a_page_with_their_curve_and_sizes(given, tmp_path):
    data, labelled = given
    inliers = np.full((31, 31), 40)
    inliers[:, 5] = inliers[5] = 12
    found = stored(tmp_path / "pairs", walked(labelled, 9), inliers)
    needs = Rule("inliers", min_inliers=30, min_neighbours=4)
    kept = rule.by_inliers(found, labelled.labels, needs)
    curve = calibrate.curve([5, 40, 60], [3, 4])
    grid = rule.grid(found, labelled.labels, needs).to_numpy().tolist()
    poll = votes.by_votes(labelled, Vote(5), needs)
    sections = cleaning.decided(needs, curve, grid, poll)
    path = cleaning.write(
        tmp_path / "page.html", labelled, kept, data, sections, found, needs
    )
    markup = path.read_text()
    assert titles(markup) == [
        *("Outcome", "Votes", "Inliers", "Sizes", "Dropped", "Kept", "Alone")
    ]
    text = words(markup)
    assert "3 pairs of one landmark, 2 of two" in text
    assert "30 are asked for here; 30 was published for DELF" in text
    assert "a hit has 30 inliers" in text and "12 inliers" in text
    assert "only say which images calibrate" in text
    assert f"0 of {(found.candidates[5] >= 0).sum()} candidates confirm it" in text


def test_a_candidate_is_a_hit_where_it_has_enough_inliers(given, tmp_path):
    _, labelled = given
    inliers = np.random.default_rng(0).integers(29, 32, (31, 31))
    inliers = np.maximum(inliers, inliers.T)
    found = stored(tmp_path, walked(labelled, 9), inliers)
    needs = Rule("inliers", min_inliers=30)
    rows = np.array([4, 30, 0])
    for row, beside in zip(
        rows, cleaning._verified(labelled, rows, found, needs), strict=True
    ):
        own = [other for other in found.candidates[row].tolist() if other >= 0]
        assert beside.rows.tolist() == own[:8]
        assert beside.labels == [f"{inliers[row, o]} inliers" for o in own[:8]]
        assert beside.hits.tolist() == [bool(inliers[row, o] >= 30) for o in own[:8]]
        enough = sum(int(inliers[row, other] >= 30) for other in own)
        assert beside.caption == f" · {enough} of {len(own)} candidates confirm it"


def test_the_table_of_sizes_has_every_cell(given, tmp_path):
    _, labelled = given
    inliers = np.random.default_rng(0).integers(0, 60, (31, 31))
    found = stored(tmp_path, walked(labelled, 9), np.maximum(inliers, inliers.T))
    needs = Rule("inliers", min_neighbours=4)
    grid = rule.grid(found, labelled.labels, needs).to_numpy().tolist()
    header, rows, own = cleaning._sizes(grid, needs)
    assert own == [3] and len(rows) == 10
    assert header == ["neighbours", *(f"{n} inliers" for n in (20, 30, 40, 50))]
    cells = {
        (int(name.split()[0]), row[0]): value
        for row in rows
        for name, value in zip(header[1:], row[1:], strict=True)
    }
    assert cells == {
        (least, count): f"{landmarks} · {images}"
        for least, count, landmarks, images in grid
    }
