import json
from pathlib import Path

import pytest

from kit.data import lists, overlap
from kit.data.sources import from_csv, official

TABLE = Path(__file__).resolve().parents[2] / "datasets_meta" / "roxford_rparis.json"
WIKI = "http://commons.wikimedia.org/wiki/Category:"


@pytest.fixture
def landmarks():
    return overlap.read_benchmarks(TABLE, ("roxford", "rparis"))


@pytest.fixture
def built(gldv2, tmp_path):
    folder = tmp_path / "lists"
    lists.build(official(gldv2), gldv2, folder, sizes=False)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        f"{WIKI}Basilique_du_Sacr%C3%A9-C%C5%93ur_(Paris)",
        "Basilique du Sacre\u0301-Cœur, Paris",  # accent and letter apart
        "BASILIQUE DU SACRÉ-CŒUR, PARIS",
        "  basilique__du sacre coeur / paris ",
    ],
)
def test_a_name_is_the_same_in_any_spelling(text):
    assert overlap.normalised(text) == "basilique du sacre coeur paris"


def test_accents_do_not_part_words():
    assert overlap.normalised("Château_d'If") == "chateau d if"
    assert overlap.normalised("Mus%C3%A9e_d%27Orsay") == "musee d orsay"


def test_letters_of_other_scripts_stay():
    assert overlap.normalised("Храм_Христа") == "храм христа"
    assert overlap.normalised("...") == ""


def test_the_table_has_the_eleven_landmarks_of_each_benchmark(landmarks):
    assert [each.name for each in landmarks] == [
        *("roxford/all_souls", "roxford/ashmolean", "roxford/balliol"),
        *("roxford/bodleian", "roxford/christ_church", "roxford/cornmarket"),
        *("roxford/hertford", "roxford/keble", "roxford/magdalen"),
        *("roxford/pitt_rivers", "roxford/radcliffe_camera"),
        *("rparis/defense", "rparis/eiffel", "rparis/invalides", "rparis/louvre"),
        *("rparis/moulinrouge", "rparis/museedorsay", "rparis/notredame"),
        *("rparis/pantheon", "rparis/pompidou", "rparis/sacrecoeur"),
        "rparis/triomphe",
    ]


def test_no_name_of_the_table_belongs_to_two_landmarks(landmarks):
    names = [text for each in landmarks for text in each.spellings]
    assert len(names) == len(set(names))
    assert all(names)


def test_one_benchmark_can_be_read_alone():
    found = overlap.read_benchmarks(TABLE, ("rparis", "rparis"))
    assert len(found) == 11
    assert {each.name.split("/")[0] for each in found} == {"rparis"}


def test_an_unknown_benchmark_and_a_missing_table_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'oxford' is not one of roxford, rparis"):
        overlap.read_benchmarks(TABLE, ("oxford",))
    with pytest.raises(FileNotFoundError, match="no such table of benchmarks"):
        overlap.read_benchmarks(tmp_path / "none.json", ("roxford",))


def test_whole_names_match_and_parts_of_names_are_told_apart(landmarks):
    categories = {
        "1": f"{WIKI}Radcliffe_Camera",
        "2": f"{WIKI}Interior_of_the_Radcliffe_Camera",
        "3": f"{WIKI}Panth%C3%A9on_(Paris)",
        "4": f"{WIKI}Pantheon_(Rome)",
        "5": f"{WIKI}Louvre",  # not the part "Louvre" of "Palais du Louvre"
        "6": f"{WIKI}Louvre-Lens",
        "7": f"{WIKI}Louvres",  # a town
        "8": f"{WIKI}View_from_the_Eiffel_Tower_to_the_Moulin_Rouge",
        "9": f"{WIKI}Christ_Church,_Dublin",
    }
    found = [
        (each.landmark_id, each.of, each.whole)
        for each in overlap.matches(categories, landmarks)
    ]
    assert found[0] == ("1", "roxford/radcliffe_camera", True)
    assert found[1:5] == [
        ("2", "roxford/radcliffe_camera", False),
        ("3", "rparis/pantheon", True),
        ("5", "rparis/louvre", True),
        ("6", "rparis/louvre", False),
    ]
    assert sorted(found[5:]) == [
        ("8", "rparis/eiffel", False),
        ("8", "rparis/moulinrouge", False),
    ]


def test_every_name_in_the_table_is_a_whole_match_of_its_landmark(landmarks):
    table = json.loads(TABLE.read_text())
    for benchmark, members in table.items():
        for name, told in members.items():
            assert told["names"]
            assert told["categories"]
            for text in (*told["names"], *told["categories"]):
                (found,) = overlap.matches({"7": f"{WIKI}{text}"}, landmarks)
                assert (found.of, found.whole) == (f"{benchmark}/{name}", True)


def test_categories_are_those_of_the_dataset(gldv2, built):
    found = overlap.read_categories(gldv2, built)
    assert found["0020"] == f"{WIKI}Pont_Neuf"
    assert len(found) == 7


def test_without_a_table_of_categories_a_landmark_is_its_own_name(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "abc":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(b"")
    table = tmp_path / "table.csv"
    table.write_text("path,label\nphotos/a.jpg,Eiffel Tower\nphotos/b.jpg,NA\n")
    lists.build(from_csv(table, tmp_path), tmp_path, tmp_path / "lists", sizes=False)
    found = overlap.read_categories(tmp_path, tmp_path / "lists")
    assert found == {"Eiffel Tower": "Eiffel Tower", "NA": "NA"}


def test_labels_of_landmarks_are_those_of_the_lists(built):
    assert overlap.labels_of(built, ["0020", "1e5", "777"]) == {"0020": 2, "1e5": 5}


def test_labels_that_a_list_shows_are_known(built):
    assert overlap.known_labels(built, "index").tolist() == [0, 1, 2, 4, 6]


def test_labels_of_queries_are_those_of_their_positives(built):
    # bbbb...1 is 0, ...2 is 1, 0...99999 is 2, ...6 is 4; ...4 has none, ...8 is not asked
    assert overlap.known_labels(built, "query").tolist() == [0, 1, 2, 4]
    (built / "solution.csv").unlink()
    assert overlap.known_labels(built, "query").tolist() == []
