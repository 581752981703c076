import pytest
import torch

from kit.rerank import category as module
from kit.rerank.category import expand_category, first_of_label, merge


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=1)


@pytest.fixture
def case():
    """Features of 30 queries, 200 index images and 150 references, with labels 0..9 and -1."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 12, generator=random)
    made = []
    for count in (30, 200, 150):
        labels = torch.randint(-1, 10, (count,), generator=random)
        noise = 0.7 * torch.randn(count, 12, generator=random)
        made += [unit(centres[labels] + noise), labels]
    return made


def ranking(queries, index, k):
    cosines = (queries.double() @ index.double().T).float()
    rows = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    return cosines.gather(1, rows), rows


def hard_by_hand(queries, labels, index, index_labels, k):
    """The whole order of every query: images of its label, then the others."""
    lists = []
    for query, label in zip(queries, labels.tolist(), strict=True):
        cosines = (index.double() @ query.double()).float()
        order = cosines.argsort(descending=True, stable=True).tolist()
        first = [r for r in order if index_labels[r] == label and label >= 0]
        lists.append((first + [r for r in order if r not in first])[:k])
    return lists


@pytest.mark.parametrize("k", [1, 15, 200])
def test_images_of_the_label_come_first(case, k):
    queries, labels, index, index_labels, *_ = case
    scores, rows = first_of_label(
        *ranking(queries, index, k), labels, index_labels, queries, index
    )
    assert rows.tolist() == hard_by_hand(queries, labels, index, index_labels, k)
    expected = (1 - torch.arange(k) / 200).expand(30, -1)
    torch.testing.assert_close(scores, expected)
    assert (scores[:, 1:] < scores[:, :-1]).all()


def test_images_that_were_not_in_the_list_are_put_in(case):
    queries, labels, index, index_labels, *_ = case
    scores, rows = ranking(queries, index, 15)
    _, new = first_of_label(scores, rows, labels, index_labels, queries, index)
    assert (~(new[:, :, None] == rows[:, None]).any(2)).any()


def test_a_query_without_a_label_keeps_its_order(case):
    queries, labels, index, index_labels, *_ = case
    given = ranking(queries, index, 15)
    nobody = torch.full_like(labels, -1)
    _, rows = first_of_label(*given, nobody, index_labels, queries, index)
    assert torch.equal(rows, given[1])


def test_equal_images_of_a_label_are_ordered_by_row():
    queries = torch.tensor([[1.0, 0.0]])
    index = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8]])
    given = ranking(queries, index, 3)
    labels = torch.tensor([5])
    marks = torch.tensor([5, 5, 5, -1, 5])
    _, rows = first_of_label(*given, labels, marks, queries, index)
    assert rows.tolist() == [[1, 2, 4]]


def test_hundreds_of_equal_images_of_two_labels_are_ordered_by_row():
    queries = torch.eye(2)
    index = torch.full((400, 2), 0.5**0.5)
    marks = torch.arange(400) % 3  # label 2 is nobody's
    given = ranking(queries, index, 200)
    _, rows = first_of_label(*given, torch.tensor([1, 0]), marks, queries, index)
    first = [list(range(start, 400, 3)) for start in (1, 0)]
    others = [[r for r in range(400) if r % 3 != start] for start in (1, 0)]
    expected = [(a + b)[:200] for a, b in zip(first, others, strict=True)]
    assert rows.tolist() == expected


def test_absent_places_stay_last(case):
    queries, labels, index, index_labels, *_ = case
    scores, rows = ranking(queries, index, 15)
    rows[:, 3:], scores[:, 3:] = -1, -torch.inf
    labels = torch.full_like(labels, 11)  # no image has it
    new_scores, new = first_of_label(scores, rows, labels, index_labels, queries, index)
    assert torch.equal(new, rows)
    assert (new_scores[:, 3:] == -torch.inf).all()
    assert torch.isfinite(new_scores[:, :3]).all()


def expanded_by_hand(queries, near, index, references, labels, k, above):
    lists = []
    for query, nearest in zip(queries, near.tolist(), strict=True):
        names = {labels[row].item() for row in nearest if row >= 0} - {-1}
        theirs = [row for row in range(len(labels)) if labels[row].item() in names]
        cosines = (index.double() @ query.double()).float()
        order = cosines.argsort(descending=True, stable=True)[:k].tolist()
        first = [
            row
            for row in order
            if any(index[row].double() @ references[r].double() > above for r in theirs)
        ]
        lists.append(first + [row for row in order if row not in first])
    return lists


@pytest.mark.parametrize(("k", "above"), [(200, 0.6), (20, 0.75), (1, 0.6), (20, 2.0)])
def test_category_expansion_matches_its_definition(case, k, above):
    queries, _, index, _, references, labels = case
    _, near = ranking(queries, references, 3)
    near[4] = -1
    near[5, 1:] = -1
    scores, rows = expand_category(
        *ranking(queries, index, k), near, labels, index, references, above
    )
    expected = expanded_by_hand(queries, near, index, references, labels, k, above)
    assert rows.tolist() == expected
    torch.testing.assert_close(scores, (1 - torch.arange(k) / 200).expand(30, -1))


def test_the_threshold_decides_something(case):
    queries, _, index, _, references, labels = case
    _, near = ranking(queries, references, 3)
    given = ranking(queries, index, 200)
    loose, strict = (
        expand_category(*given, near, labels, index, references, above)[1]
        for above in (0.6, 0.75)
    )
    assert not torch.equal(loose, strict)
    assert not torch.equal(loose, given[1])


def test_expansion_leaves_absent_places_last(case):
    queries, _, index, _, references, labels = case
    _, near = ranking(queries, references, 3)
    scores, rows = ranking(queries, index, 20)
    rows[2, 5:], scores[2, 5:] = -1, -torch.inf
    new_scores, new = expand_category(scores, rows, near, labels, index, references)
    assert (new[2, 5:] == -1).all() and (new[2, :5] >= 0).all()
    assert (new_scores[2, 5:] == -torch.inf).all()


def test_the_block_sizes_do_not_matter(case, monkeypatch):
    queries, tags, index, index_labels, references, labels = case
    _, near = ranking(queries, references, 3)
    given = ranking(queries, index, 20)

    def both():
        hard = first_of_label(*given, tags, index_labels, queries, index)
        return *hard, *expand_category(*given, near, labels, index, references)

    expected = both()
    for name, size in (("QUERIES", 16), ("PAIRS", 5), ("WIDTH", 3)):
        monkeypatch.setattr(module, name, size)
    assert all(map(torch.equal, both(), expected))


def test_merging_tags():  # worked by hand
    tags = torch.tensor([[4, 1, 7, 2, 9, -1], [4, 2, 7, 3, 8, -1], [4, 3, 5, 3, 9, 6]])
    scores = torch.tensor(
        [[1, 9, 1, 5, 1, 1], [1, 1, 1, 2, 3, 1], [1, 1, 3, 2, 2, 3]]
    ).float()
    assert merge(tags, scores).tolist() == [4, -1, 5, 2, 8, 6]
    weights = torch.tensor([1.0, 4.0, 1.0])
    assert merge(tags, scores, weights).tolist() == [4, -1, 7, 3, 8, -1]


def merged_by_hand(tags, scores):
    found = []
    for names, worth in zip(tags.T.tolist(), scores.T.tolist(), strict=True):
        if len(set(names)) == 1:
            found.append(names[0])
        elif len(set(names)) == len(names):
            found.append(-1)
        else:
            sums = [
                (-sum(w for n, w in zip(names, worth, strict=True) if n == name), name)
                for name in set(names)
            ]
            found.append(min(sums)[1])
    return found


@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_merging_matches_its_definition(models):
    random = torch.Generator().manual_seed(models)
    tags = torch.randint(-1, 3, (models, 300), generator=random)
    scores = torch.randint(1, 5, (models, 300), generator=random) / 4
    assert merge(tags, scores).tolist() == merged_by_hand(tags, scores)


def test_inputs_are_left_as_they_were(case):
    queries, tags, index, index_labels, references, labels = case
    scores, rows = ranking(queries, index, 20)
    near = ranking(queries, references, 3)[1]
    given = [*case, scores, rows, near]
    before = [each.clone() for each in given]
    first_of_label(scores, rows, tags, index_labels, queries, index)
    expand_category(scores, rows, near, labels, index, references)
    one = torch.tensor([[3, 4]])
    merge(one, torch.ones(1, 2))[0] = 9
    assert one.tolist() == [[3, 4]]
    assert all(map(torch.equal, given, before))


def test_parts_that_do_not_fit_are_refused(case):
    queries, tags, index, index_labels, references, labels = case
    given = ranking(queries, index, 20)
    with pytest.raises(ValueError, match="30 queries with 29 labels"):
        first_of_label(*given, tags[1:], index_labels, queries, index)
    with pytest.raises(ValueError, match="200 features and 199 labels|names row 199"):
        first_of_label(*given, tags, index_labels[1:], queries, index)
    with pytest.raises(ValueError, match="150 references with 149 labels"):
        expand_category(*given, given[1][:, :3], labels[1:], index, references)
    with pytest.raises(ValueError, match="must be of one shape"):
        merge(torch.zeros(2, 3), torch.zeros(2, 4))
