import random

import pytest

from kit.data.id_forms import plain_id, refuse_other_form

KNOWN = [f"{random.Random(n).getrandbits(64):016x}" for n in range(40)]
KNOWN += [f"{n:016x}" for n in range(40)]  # these lose zeros as numbers
FORMS = {
    "jpg": lambda name: f"{name}.jpg",
    "path": lambda name: f"index/{name[0]}/{name}.JPG",
    "windows": lambda name: f"index\\{name[0]}\\{name}.png",
    "upper": str.upper,
    "number": lambda name: name.lstrip("0") or "0",
    "float": lambda name: f"{name}.0",
    "space": lambda name: f" {name}",
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_another_form_must_be_refused_with_both_spellings(form):
    write = FORMS[form]
    good = next(name for name in KNOWN if write(name) != name)
    ids = [write(name) for name in KNOWN if write(name) != name]
    assert plain_id(write(good)) == plain_id(good)
    with pytest.raises(ValueError) as refused:
        refuse_other_form(ids, KNOWN, "answers.csv", "the index")
    assert str(refused.value).startswith(f"answers.csv: {len(ids)} of {len(ids)} ids")
    assert f"{write(good)!r} for {good!r}" in str(refused.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("right", "refused"), [(0, True), (4, True), (20, False)])
def test_a_few_ids_of_another_form_must_not_matter(form, right, refused):
    others = [FORMS[form](n) for n in KNOWN if FORMS[form](n) != n][:10]
    ids = KNOWN[:0:-1][:right] + others
    if not refused:
        refuse_other_form(ids, KNOWN, "answers.csv", "the index")
        return
    with pytest.raises(ValueError, match=r"answers\.csv: 10 of "):
        refuse_other_form(ids, KNOWN, "answers.csv", "the index")


@pytest.mark.parametrize(
    "ids", [[], [""], ["other"], ["f" * 16], [f"{n:015d}f" for n in range(99)]]
)
def test_wrong_answers_must_not_be_taken_for_another_form(ids):
    refuse_other_form(ids, KNOWN, "answers.csv", "the index")
    refuse_other_form(ids, [], "answers.csv", "the index")


def test_ids_that_differ_only_in_case_must_stay_two():
    refuse_other_form(["a", "B"], ["a", "A", "b", "B"], "answers.csv", "the index")
