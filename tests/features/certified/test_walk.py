"""Rows whose screening errs by nearly as much as is proven possible, the wrong way."""

from dataclasses import replace

import pytest
import torch

from kit.features.search import knn
from kit.rerank.addends import Addends, Members

SIGNS = torch.tensor([1.0] * 32 + [-1.0] * 32)


def behind(query: torch.Tensor, rows: int) -> torch.Tensor:
    """(N, D) rows of scores near -1."""
    noise = torch.randn(
        rows, query.shape[1], generator=torch.Generator().manual_seed(0)
    )
    return torch.nn.functional.normalize(0.02 * noise - query.float()).half()


def as_member(row: int) -> Addends:
    """Adds nothing to one row, whose exact score is then known before the screening."""
    starts, value = torch.tensor([0, 1]), torch.zeros(1, dtype=torch.float64)
    return Addends(members=Members(starts, torch.tensor([row]), value))


@pytest.mark.parametrize(
    ("screening", "above", "weight"),
    [("bf16", (1 + 2.0**-8, 1 + 3 * 2.0**-8), 1.0), ("fp16", (1, 1 + 2.0**-10), None)],
)
@pytest.mark.parametrize("block", [32, 512])
def test_a_query_that_rounding_turns_as_far_as_it_can_loses_no_row(
    screening, above, weight, block
):
    # one half is rounded down, the other up, each by half a unit; the row is parallel to that
    query = torch.where(SIGNS > 0, *above)[None].half() / 8
    weights = [weight or 1 + 2.0**-11]
    database = behind(query, 2000)
    database[[700, 1500]] = SIGNS.half() / 8
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[screening]
    exact = weights[0] * query.double()
    error = (exact - exact.to(dtype).double()) @ database[700].double()
    unit = 2.0**-8 if screening == "bf16" else 2.0**-11
    assert 0.999 * unit < error.item() <= unit
    options = {"weights": weights, "screening": screening, "block": block}
    # row 1500, its equal, sets the floor by its exact score
    found = knn(query, database, 1, addends=as_member(1500), **options)
    assert found.rows.tolist() == [[700]]
    assert found.scores[0, 0] == (exact @ database[700].double()).float()


@pytest.mark.parametrize("other", [484, 499, 1999])  # in a block of the sample, and not
@pytest.mark.parametrize("options", [{}, {"rows": torch.arange(2000)}])
def test_rows_that_rounding_parts_as_far_as_it_can_are_told_apart(other, options):
    # in halves of a bfloat16's unit; a value 4m + 1 goes down to 4m, 4m + 3 up to 4m + 4
    signs = torch.tensor([1.0] * 26 + [-1.0] * 14)
    best = torch.where(signs > 0, 325.0, 323.0)
    second = torch.tensor([327.0] * 20 + [323.0] * 6 + [325.0] * 14)
    query = torch.cat([324 * signs / 2**11, torch.tensor([2.0**-5])])[None].half()
    database = behind(query, 2000)
    small = torch.tensor(
        [83 * 2.0**-11]
    )  # puts scores where rounding them does harm too
    database[40] = torch.cat([best / 2**11, small]).half()
    database[other] = torch.cat([second / 2**11, small]).half()
    exact = (query.double() @ database[[40, other]].double().T)[0]
    low, high = (query.double() @ database[[40, other]].bfloat16().double().T)[0]
    assert exact[0] == exact[1] and high - low > 1.58 * 2.0**-8
    unit = 2.0**-9  # of a score in bfloat16
    assert 154.4 < low / unit < 154.5 and 157.5 < high / unit < 157.6
    found = knn(query, database, 1, screening="bf16", block=32, **options)
    assert found.rows.tolist() == [[40]]
    assert found.scores[0, 0] == exact[0].float()


def test_a_row_whose_products_are_lost_one_by_one_while_adding_is_found():
    row = torch.full((2048,), 2.0**-12).half()  # 1, and 2047 halves of its last unit
    row[0] = 1
    database = behind(row[None], 2000)
    database[[700, 1500]] = row
    options = {"screening": "fp32", "addends": as_member(1500)}
    found = knn(row[None], database, 1, **options)
    assert found.rows.tolist() == [[700]]
    assert found.scores.item() == 1 + 2.0**-13


def test_rows_whose_addends_leave_no_digits_to_tell_them_apart_are_equal():
    database = torch.zeros(2000, 3).half()
    database[700] = torch.tensor([0.5 - 2.0**-12, 0.75, 0.4375])
    database[1500] = torch.tensor([0.5, 0.75, 0.4375])
    heavy = torch.full(
        (2000,), 8192.0, dtype=torch.float64
    )  # then half a unit is 2^-11
    addends = replace(as_member(1500), by_row=heavy)
    query = torch.tensor([[1.0, 0, 0]]).half()
    found = knn(query, database, 1, screening="fp32", addends=addends)
    assert found.rows.tolist() == [[700]] and found.scores.item() == 8192.5
