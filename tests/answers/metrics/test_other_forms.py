"""Files whose ids are those of the truth in another form: not 0.0000, but a refusal."""

import pytest

from kit.answers.metrics import gap, mean_ap

IDS = [f"{number:015x}f" for number in range(9, 21)]
FORMS = {
    "jpg": lambda name: f"{name}.jpg",
    "path": lambda name: f"index/{name}.jpg",
    "upper": str.upper,
    "zeros": lambda name: name.lstrip("0"),
    "float": lambda name: f"{name}.0",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["id", "answer"])
@pytest.mark.parametrize("metric", [mean_ap, gap])
def test_a_file_of_another_form_must_be_refused_with_both_spellings(
    tmp_path, metric, column, form
):
    name, score = ("images", "") if metric is mean_ap else ("landmarks", " 0.5")
    solution, answers = tmp_path / "solution.csv", tmp_path / "answers.csv"
    halves = ("Public", "Private")
    rows = [f"{one},{one},{halves[n % 2]}" for n, one in enumerate(IDS)]
    solution.write_text("\n".join([f"id,{name},Usage", *rows]) + "\n")

    def evaluate(write_id, write_answer):
        rows = [f"{write_id(one)},{write_answer(one)}{score}" for one in IDS]
        answers.write_text("\n".join([f"id,{name}", *rows]) + "\n")
        return metric.evaluate_file(answers, solution)

    right = evaluate(str, str)
    assert right.public == right.private == 1
    ways = (FORMS[form], str) if column == "id" else (str, FORMS[form])
    shown = f"answers.csv: 12 of 12 ids .*'{FORMS[form](IDS[0])}' for '{IDS[0]}'"
    with pytest.raises(ValueError, match=shown):
        evaluate(*ways)


@pytest.mark.parametrize("metric", [mean_ap, gap])
def test_wrong_answers_must_be_worth_nothing_and_no_error(tmp_path, metric):
    name, score = ("images", "") if metric is mean_ap else ("landmarks", " 0.5")
    (tmp_path / "solution.csv").write_text(
        f"id,{name},Usage\nq,a,Public\nr,b,Private\n"
    )
    (tmp_path / "answers.csv").write_text(f"id,{name}\nq,b{score}\nr,z{score}\n")
    found = metric.evaluate_file(tmp_path / "answers.csv", tmp_path / "solution.csv")
    assert found.public == found.private == 0
