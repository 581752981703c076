import math
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kit.features import search
from kit.features.certified.walk import Walk
from kit.features.certified.worker import Worker
from kit.features.search import Neighbours, knn, knn_over_ranks, merge, top
from kit.launch import Rank
from kit.rerank.addends import Addends, Members


def unit(rows, dim=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, dim, generator=random)
    return torch.nn.functional.normalize(vectors).half()


def tight(rows, dim=32, spread=1e-3, seed=1):
    """A few clusters, tighter than bfloat16 can tell apart, with exact duplicates."""
    random = torch.Generator().manual_seed(seed)
    centres = unit(3, dim, seed=7).float()
    vectors = centres[torch.arange(rows) % 3]
    vectors = vectors + spread * torch.randn(rows, dim, generator=random)
    vectors = torch.nn.functional.normalize(vectors).half()
    vectors[rows // 2 :: 5] = vectors[0]
    return vectors


def whole_numbers(*shape, seed=0, largest=3):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=random).float()


def by_hand(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, larger first, of equal ones the lower column, by sorting it all."""
    columns = np.arange(scores.shape[1])
    rows = np.array([np.lexsort((columns, -(row + 0.0)))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def brute(query, database, k):
    scores = query.double().numpy() @ database.double().numpy().T
    return by_hand(scores.astype(np.float32), k)


def joined(vectors):
    """Models side by side: their products add up."""
    return torch.cat(list(vectors), dim=1)


def agrees(found, expected):
    """Scores (0.0 is -0.0) and rows are those expected, to the bit."""
    scores, rows = found
    assert torch.equal(rows, torch.from_numpy(expected[1]))
    assert torch.equal(scores, torch.from_numpy(expected[0]).float())


def same(found, other):
    assert torch.equal(found.rows, other.rows)
    assert torch.equal(found.scores, other.scores)


@pytest.fixture
def exact_blocks(monkeypatch):
    """Counts the blocks that are scored exactly as a whole."""
    counted = []
    score = Worker.score_exactly
    monkeypatch.setattr(
        Worker,
        "score_exactly",
        lambda worker, start: (counted.append(start), score(worker, start)),
    )
    return counted


# knn


@pytest.mark.parametrize("screening", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_knn_matches_sorting_every_score(k, screening):
    query, database = unit(20), unit(6000, seed=1)
    agrees(knn(query, database, k, screening=screening), brute(query, database, k))


@pytest.mark.parametrize("screening", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-2, 0.05])
def test_no_row_is_lost_among_many_that_low_precision_cannot_tell_apart(
    spread, screening
):
    database = tight(4000, spread=spread)
    query = torch.cat([database[:9], unit(9, seed=3), -database[:3]])
    found = knn(query, database, 7, screening=screening, block=256)
    agrees(found, brute(query, database, 7))


def test_a_row_that_bfloat16_turns_round_as_far_as_it_can_is_not_lost():
    # units of 2^-10: the best row, 3 above one everywhere, loses them; another, 5 above or
    # 4 below, gains 3 where it is above, and looks better by two of bfloat16's steps
    query = torch.full((1, 65), 253 * 2.0**-13)
    query[0, :30] += 2.0**-13
    query[0, 64] = (1 - query[0, :64].square().sum()).sqrt()
    database = torch.cat([unit(2000, 64, seed=1), torch.zeros(2000, 1).half()], dim=1)
    other = torch.where(torch.arange(64) % 4 == 3, 1 - 2.0**-8, 1 + 5 * 2.0**-10)
    database[3, :64] = other / 8
    database[1500, :64] = (1 + 3 * 2.0**-10) / 8
    seen = (query.bfloat16() @ database[[3, 1500]].bfloat16().T)[0]
    assert seen[0] - seen[1] == 2.0**-9
    for block in (64, 256):
        found = knn(query, database, 1, screening="bf16", block=block)
        assert found.rows.tolist() == [[1500]]


def test_screening_alone_decides_which_rows_are_scored(exact_blocks):
    query, database = unit(20), unit(6000, seed=1)
    agrees(knn(query, database, 5, screening="bf16"), brute(query, database, 5))
    assert exact_blocks == []


def test_blocks_of_equal_rows_are_scored_exactly_at_once(exact_blocks):
    database = unit(1).repeat(3000, 1)
    found = knn(unit(4), database, 5, screening="bf16", block=512)
    assert found.rows.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert len(exact_blocks) == 6


def test_too_many_pending_rows_are_scored_in_between(monkeypatch):
    monkeypatch.setattr(Walk, "most", 100)
    query, database = unit(20, 8), unit(5000, 8, seed=1)
    agrees(knn(query, database, 30, block=128), brute(query, database, 30))


@pytest.mark.parametrize("block", [32, 100, 2048, 10_000])
@pytest.mark.parametrize("workers", [1, 3])
def test_knn_does_not_depend_on_blocks_and_workers(block, workers):
    query, database = unit(20), tight(5000, spread=0.05)
    found = knn(query, database, 9, block=block, devices=["cpu"] * workers)
    agrees(found, brute(query, database, 9))


def test_knn_does_not_depend_on_how_many_queries_are_searched_at_a_time(monkeypatch):
    query, database = unit(20), unit(3000, seed=1)
    expected = knn(query, database, 9)
    monkeypatch.setattr(search, "QUERIES", 3)
    same(knn(query, database, 9), expected)


def test_permuting_the_database_permutes_the_result():
    query, database = unit(20), unit(3000, seed=1)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    scores, rows = knn(query, database[order], 9)
    same(Neighbours(scores, order[rows]), knn(query, database, 9))


def test_of_equal_neighbours_the_first_row_wins():
    database = torch.cat([unit(30, seed=1), unit(1).repeat(300, 1)])
    rows = knn(unit(1), database, 12, block=64).rows
    assert rows.tolist() == [list(range(30, 42))]


def test_inner_products_are_exact_in_any_order():
    query, database = unit(1, 512), unit(50, 512, seed=1)
    products = query.double() * database.double()
    for order in range(5):
        turned = torch.randperm(512, generator=torch.Generator().manual_seed(order))
        total = torch.zeros(50, dtype=torch.double)
        for column in turned:
            total += products[:, column]
        assert [math.fsum(row) for row in products.tolist()] == total.tolist()


def test_float32_queries_are_rounded_as_a_store_would():
    query, database = torch.nn.functional.normalize(torch.randn(5, 32)), unit(500)
    same(knn(query, database, 5), knn(query.half(), database, 5))


def test_arrays_and_maps_are_searched_like_tensors(tmp_path):
    query, database = unit(5), unit(500, seed=1)
    np.save(tmp_path / "rows.npy", database.numpy())
    expected = knn(query, database, 5)
    same(knn(query.numpy(), np.load(tmp_path / "rows.npy", mmap_mode="r"), 5), expected)


def test_a_database_of_fewer_rows_gives_them_all():
    query, database = unit(5), unit(7, seed=1)
    agrees(knn(query, database, 100), brute(query, database, 7))


def test_zero_rows_are_rows_of_score_zero():
    database = unit(200, seed=1)
    database[50:60] = 0
    agrees(knn(unit(5), database, 200), brute(unit(5), database, 200))


@pytest.mark.parametrize("k", [3, 300])
def test_rows_that_are_skipped_never_appear(k):
    query, database = unit(6), unit(3000, seed=1)
    skip = torch.zeros(3000, dtype=torch.bool)
    skip[brute(query, database, 2)[1].ravel()] = True
    skip[200:2900] = True
    found = knn(query, database, k, skip=skip, block=96)
    left = (~skip).nonzero()[:, 0]
    scores, rows = brute(query, database[left], k)
    count = rows.shape[1]
    assert torch.equal(found.rows[:, :count], left[torch.from_numpy(rows)])
    assert torch.equal(found.scores[:, :count], torch.from_numpy(scores))
    assert (found.rows[:, count:] == -1).all() and found.rows.shape == (6, k)
    assert (found.scores[:, count:] == -torch.inf).all()


def test_rows_choose_who_takes_part_and_the_result_is_positions():
    query, database = unit(6), unit(3000, seed=1)
    rows = torch.randint(3000, (1000,), generator=torch.Generator().manual_seed(0))
    agrees(knn(query, database, 9, rows=rows), brute(query, database[rows], 9))


@pytest.mark.parametrize("screening", ["bf16", "fp32"])
def test_scores_of_several_models_are_summed_by_weight(screening):
    weights, dims = [0.7, 0.0, 1.6], [32, 8, 16]
    query = [unit(6, dim, seed=dim) for dim in dims]
    database = [unit(3000, dim, seed=dim + 1) for dim in dims]
    scores = np.zeros((6, 3000))
    for weight, ours, theirs in zip(weights, query, database, strict=True):
        scores += weight * (ours.double().numpy() @ theirs.double().numpy().T)
    found = knn(query, database, 9, weights=weights, screening=screening)
    agrees(found, by_hand(scores.astype(np.float32), 9))


def test_the_result_may_go_to_a_mapped_file(tmp_path):
    query, database = unit(6), unit(300, seed=1)
    out = Neighbours(torch.zeros(6, 4), torch.zeros(6, 4, dtype=torch.long))
    same(knn(query, database, 4, out=out), knn(query, database, 4))
    same(out, knn(query, database, 4))


def test_no_queries_have_no_neighbours():
    assert knn(unit(6)[:0], unit(50), 4).rows.shape == (0, 4)


def test_knn_leaves_inputs_and_threads_as_they_were():
    query, database = unit(6), unit(300, seed=1)
    before, threads = (query.clone(), database.clone()), torch.get_num_threads()
    knn(query, database, 4, devices=["cpu", "cpu"])
    assert torch.equal(query, before[0]) and torch.equal(database, before[1])
    assert torch.get_num_threads() == threads


def test_screening_is_chosen_by_measurement_once():
    assert search.faster_on_cpu() in ("bf16", "fp32")
    assert search.faster_on_cpu.cache_info().currsize == 1


def odd(value, row=7):
    database = unit(300, seed=1)
    database[row] = value
    return database


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: knn(unit(2), unit(9), 0), "^k is 0; it must be at least 1$"),
        (lambda: knn(unit(2), unit(9, 16), 1), "32 dimensions, the database 16"),
        (lambda: knn(unit(2), unit(9)[:0], 1), "^the database has no rows$"),
        (lambda: knn(unit(2), odd(torch.nan), 1), "^row 7 .* a value not finite"),
        (lambda: knn(unit(2), odd(torch.inf), 1), "^row 7 .* a value not finite"),
        (lambda: knn(unit(2), odd(0.5), 1), "^row 7 .* length 2.828, not 1"),
        (lambda: knn(unit(2), odd(0.5), 100), "^row 7 .* length 2.828, not 1"),
        (lambda: knn(odd(0.5), unit(9), 1), "^row 7 .* length 2.828, not 1"),
        (lambda: knn(unit(2), unit(9), 1, screening="int8"), "choose from auto, bf16"),
        (lambda: knn(unit(2), unit(9), 1, rows=[9]), "rows has 9; the database has 9"),
        (lambda: knn(unit(2), unit(9), 1, skip=torch.ones(8)), "skip must be 9 bool"),
        (lambda: knn(unit(2), unit(9), 1, devices=[]), "devices is empty"),
        (lambda: knn([unit(2)], [unit(9)], 1, weights=[-1]), "weight -1 of model 0"),
        (lambda: knn([unit(2)], [unit(9)], 1, weights=[1, 2]), "one of each for every"),
        (
            lambda: knn([unit(2), unit(3)], [unit(9)] * 2, 1),
            "model 1 has 3 queries, model 0 2",
        ),
        (
            lambda: knn([unit(2)] * 2, [unit(9), unit(8)], 1),
            "model 1 has 8 rows, model 0 9",
        ),
        (
            lambda: knn(unit(2), unit(9), 1, addends=Addends(by_row=torch.ones(8))),
            "by_row of the addends is for 8 index rows, not 9",
        ),
    ],
)
def test_knn_refuses_what_it_cannot_answer(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_database_must_be_float16():
    with pytest.raises(TypeError, match="database: torch.float32, not float16"):
        knn(unit(2), unit(9).float(), 1)


# addends


def addends(queries, index, sign, seed=0, members=40, groups=7):
    random = np.random.default_rng(seed)
    rows = [random.choice(index, members, replace=False) for _ in range(queries)]
    values = random.random(queries * members) + 0.2
    return Addends(
        by_row=torch.from_numpy(-0.1 * random.random(index)),
        groups=torch.from_numpy(random.integers(-1, groups, index)),
        by_group=torch.from_numpy(0.2 * random.random((queries, groups)) - 0.05),
        members=Members(
            torch.arange(queries + 1) * members,
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(sign * values),
        ),
    )


def with_addends(scores, given):
    """The definition, entry by entry."""
    scores = scores.copy()
    for query, row in np.ndindex(scores.shape):
        if given.by_row is not None:
            scores[query, row] += given.by_row[row].item()
        if given.groups is not None and given.groups[row] >= 0:
            scores[query, row] += given.by_group[query, given.groups[row]].item()
    if given.members is not None:
        starts, rows, values = given.members
        for query in range(len(scores)):
            for at in range(starts[query], starts[query + 1]):
                scores[query, rows[at]] += values[at].item()
    return scores.astype(np.float32)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("parts", ["by_row", "groups", "members", "all"])
@pytest.mark.parametrize("k", [1, 20])
def test_addends_are_added_before_the_best_are_chosen(k, parts, sign):
    query, database = unit(5), unit(1500, seed=1)
    given = addends(5, 1500, sign)
    if parts != "all":
        kept = {parts: getattr(given, parts)}
        kept |= {"by_group": given.by_group} if parts == "groups" else {}
        given = Addends(**kept)
    scores = with_addends(query.double().numpy() @ database.double().numpy().T, given)
    for options in ({"block": 96}, {"devices": ["cpu"] * 2}, {"screening": "fp32"}):
        agrees(knn(query, database, k, addends=given, **options), by_hand(scores, k))


def test_many_small_groups_are_searched_like_few_large_ones():
    query, database = unit(5), tight(2000, spread=0.05)
    given = addends(5, 2000, 1, groups=700)
    scores = with_addends(query.double().numpy() @ database.double().numpy().T, given)
    agrees(knn(query, database, 9, addends=given), by_hand(scores, 9))


def test_addends_meet_skipped_and_chosen_rows_and_exact_blocks(exact_blocks):
    query, database = unit(5), unit(1, seed=1).repeat(900, 1)
    rows, skip = torch.arange(899, -1, -1), torch.zeros(900, dtype=torch.bool)
    skip[::3] = True
    given = addends(5, 900, 1)
    scores = query.double().numpy() @ database[rows].double().numpy().T
    scores = with_addends(scores, given)
    scores[:, skip] = -np.inf
    found = knn(query, database, 9, rows=rows, skip=skip, addends=given, block=64)
    agrees(found, by_hand(scores, 9))


def test_members_are_found_once_where_fewer_rows_than_k_can_be_found():
    query, database = unit(5), unit(3000, seed=1)
    skip = torch.ones(3000, dtype=torch.bool)
    skip[::300] = False
    given = addends(5, 3000, 1, members=900)
    scores = query.double().numpy() @ database.double().numpy().T
    scores = with_addends(scores, given)
    scores[:, skip] = -np.inf
    found = knn(query, database, 20, skip=skip, addends=given, block=64)
    expected_scores, expected = by_hand(scores, 20)
    agrees(found, (expected_scores, np.where(np.isinf(expected_scores), -1, expected)))


@pytest.mark.parametrize("worth", [1e-3, 0.5, 3e5, -3e5])
def test_many_members_of_any_worth_are_screened_without_losing_one(worth):
    query, database = unit(5), tight(2000, spread=0.02)
    given = addends(5, 2000, worth, members=1500)
    scores = query.double().numpy() @ database.double().numpy().T
    scores = with_addends(scores, given)
    for k in (7, 30):
        agrees(knn(query, database, k, addends=given, block=96), by_hand(scores, k))
    even = torch.full((7500,), 1.0 * worth)
    given = Addends(members=given.members._replace(values=even))
    scores = query.double().numpy() @ database.double().numpy().T
    scores = with_addends(scores, given)
    agrees(knn(query, database, 30, addends=given, block=96), by_hand(scores, 30))


def test_addends_follow_their_queries_when_these_are_searched_in_turns(monkeypatch):
    query, database = unit(5), unit(1500, seed=1)
    given = addends(5, 1500, 1)
    expected = knn(query, database, 9, addends=given)
    monkeypatch.setattr(search, "QUERIES", 2)
    same(knn(query, database, 9, addends=given), expected)


# merge and ranks


@pytest.mark.parametrize("k", [1, 9, 5000])
def test_neighbours_of_parts_merge_into_those_of_the_whole(k):
    query, database = unit(6), tight(900, spread=0)
    parts = [
        Neighbours(found.scores, found.rows + start)
        for start in (300, 0, 600)
        for found in [knn(query, database[start : start + 300], k)]
    ]
    same(merge(parts, k), knn(query, database, k))


def _rank(number, world, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=world
    )
    torch.set_num_threads(1)
    rank = Rank(number, world, number, torch.device("cpu"))
    query, database = unit(6), tight(700, spread=0.01)
    given = addends(6, 700, 1)
    skip = torch.arange(700) % 7 == 0
    found = [
        knn_over_ranks(query, database, 9, rank),
        knn_over_ranks(query, database, 9, rank, addends=given, skip=skip, block=64),
        knn_over_ranks(query, database[:2], 9, rank),
    ]
    torch.save([tuple(each) for each in found], f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_find_together_what_one_process_finds(world, tmp_path):
    mp.spawn(_rank, (world, tmp_path), world)
    query, database = unit(6), tight(700, spread=0.01)
    skip = torch.arange(700) % 7 == 0
    expected = [
        knn(query, database, 9),
        knn(query, database, 9, addends=addends(6, 700, 1), skip=skip),
        knn(query, database[:2], 9),
    ]
    for number in range(world):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        for ours, one in zip(found, expected, strict=True):
            same(Neighbours(*ours), one)


# top

SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf),
    *(1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1 + 2**-23),
]


@pytest.mark.parametrize("k", [1, 4, 30, 300])
def test_top_matches_sorting_where_floats_are_peculiar(k):
    random = np.random.default_rng(0)
    scores = random.choice(np.array(SPECIAL, np.float32), (40, 30))
    agrees(top(torch.from_numpy(scores), k), by_hand(scores, k))


@pytest.mark.parametrize("k", [1, 10, 100])
def test_top_matches_sorting_where_many_are_equal(k):
    scores = whole_numbers(30, 400, largest=2)
    agrees(top(scores, k), by_hand(scores.numpy(), k))


def test_top_matches_sorting_of_any_floats():
    bits = np.random.default_rng(0).integers(0, 2**32, 6000, dtype=np.uint32)
    scores = bits.view(np.float32)
    scores = scores[~np.isnan(scores)][:5500].reshape(10, 550)
    agrees(top(torch.from_numpy(scores), 550), by_hand(scores, 550))


def test_minus_zero_is_equal_to_zero():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert top(scores, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_nothing_is_worse_than_minus_infinity():
    scores = torch.tensor([[-math.inf, -math.inf, -3.4e38]])
    values, columns = top(scores, 3)
    assert columns.tolist() == [[2, 0, 1]]
    assert values[0, 1:].tolist() == [-math.inf, -math.inf]


def test_top_of_a_transposed_view_is_that_of_its_copy():
    scores = whole_numbers(9, 9)
    agrees(top(scores.T, 5), by_hand(scores.T.contiguous().numpy(), 5))


def test_top_leaves_its_input_as_it_was():
    scores = whole_numbers(4, 9)
    before = scores.clone()
    top(scores, 3)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_skips_no_column_of_wide_scores(k):
    scores = torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    scores[:, 4000:4030] = scores[:, :30]  # ties across
    scores[3] = 0.5
    agrees(top(scores[:3], k), by_hand(scores[:3].numpy(), k))
    agrees(top(scores, k), by_hand(scores.numpy(), k))


# zero queries, as those of images that could not be read


@pytest.mark.parametrize("k", [1, 9, 3000])
def test_zero_queries_find_the_first_rows_that_are_there(k):
    query, database = unit(40), unit(2500, seed=1)
    query[::3] = 0
    skip = torch.zeros(2500, dtype=torch.bool)
    skip[[0, 2]] = True
    found = knn(query, database, k, skip=skip, block=96)
    scores = query.double().numpy() @ database.double().numpy().T
    kept = (~skip).nonzero()[:, 0].numpy()
    best, at = by_hand(scores[:, kept].astype(np.float32), k)
    width = best.shape[1]
    agrees(Neighbours(found.scores[:, :width], found.rows[:, :width]), (best, kept[at]))
    assert (found.rows[:, width:] == -1).all()
    parts = [knn(query[n : n + 1], database, k, skip=skip) for n in range(4)]
    for name in ("scores", "rows"):
        one = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(found, name)[:4], one)


def test_a_query_that_is_zero_for_one_model_only_is_searched():
    query, database = [unit(9), unit(9, seed=2)], [unit(800, seed=1), unit(800, seed=3)]
    query[0][4] = 0
    query[1][[4, 5]] = 0
    found = knn(query, database, 7)
    agrees(found, brute(joined(query), joined(database), 7))


def test_zero_queries_with_addends_are_ordered_by_these():
    query, database = unit(6), unit(900, seed=1)
    query[2:] = 0
    given = addends(6, 900, 1)
    scores = with_addends(query.double().numpy() @ database.double().numpy().T, given)
    agrees(knn(query, database, 9, addends=given), by_hand(scores, 9))


def test_an_interruption_ends_a_search_at_its_next_block(monkeypatch):
    taken = []
    screen = Worker.screen

    def slow(self, start):
        taken.append(start)
        time.sleep(0.02)
        screen(self, start)

    monkeypatch.setattr(Worker, "screen", slow)
    query, database = unit(30), unit(60_000, seed=1)

    def ring(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            knn(query, database, 3, block=128, devices=["cpu"] * 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < len(taken) < 200  # of 469 blocks
