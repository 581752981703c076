import json
import multiprocessing
import os
import socket

import numpy as np
import pytest

from kit import checksums, launch
from kit.features import graph, store
from kit.features.graph import Job

SIZE, LOST = 57, (0, 20)


def vectors(seed=0):
    """Unit rows, some of them equal, two unreadable."""
    found = np.random.default_rng(seed).standard_normal((SIZE, 16))
    found[30:36] = found[29]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    found[list(LOST)] = 0
    return found.astype(np.float16)


def write(folder, values, model="m"):
    about = {
        "model": {"name": "clean", "hash": model * 64},
        "list": {"name": "index", "hash": "i" * 64},
        "seen": {},
    }
    ids = np.char.mod("%04d", np.arange(len(values))).astype("U16")
    store.create(folder, ids, values.shape[1], 8, about)
    writer = store.Writer(folder)
    for block in range(len(writer.done)):
        writer.write(block, values[block * 8 : block * 8 + 8])
    store.finish(folder)
    return folder


@pytest.fixture
def features(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "BLOCK", 10)
    return write(tmp_path / "features", vectors())


def by_hand(values, k):
    """Every row's best others: larger products first, then lower rows; readable ones only."""
    exact = values.astype(np.float64)
    scores = (exact @ exact.T).astype(np.float32)
    rows = np.full((len(values), k), -1)
    products = np.full((len(values), k), -np.inf, np.float32)
    for i in range(len(values)):
        others = [j for j in range(len(values)) if j != i and j not in LOST]
        best = sorted(others, key=lambda j: (-scores[i, j], j))[:k]
        if i not in LOST:
            rows[i, : len(best)], products[i, : len(best)] = best, scores[i, best]
    return rows, products


@pytest.mark.parametrize("k", [1, 5, SIZE - 3, 100])
def test_a_graph_is_that_of_the_sorted_products(features, tmp_path, k):
    folder = graph.build(Job(features, tmp_path / "graph", k))
    found = graph.load(folder, store.load(features))
    rows, scores = by_hand(vectors(), k)
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.scores, scores)
    assert (len(found), found.k, found.rows.dtype) == (SIZE, k, np.int32)


def test_a_finished_graph_is_left_alone_and_a_block_that_lacks_is_made(
    features, tmp_path
):
    job = Job(features, tmp_path / "graph", 5)
    graph.build(job)
    rows = np.load(job.out / "rows.npy", mmap_mode="r+")
    whole = rows.copy()
    rows[:] = 7
    rows.flush()
    _seal(job.out)  # as if it had been written so
    graph.build(job)
    assert (np.load(job.out / "rows.npy") == 7).all()
    done = np.load(job.out / "done.npy", mmap_mode="r+")
    done[2] = 0
    done.flush()
    _seal(job.out, complete=False)
    graph.build(job)
    again = np.load(job.out / "rows.npy")
    assert (again[20:30] == whole[20:30]).all()
    assert (again[:20] == 7).all() and (again[30:] == 7).all()


def _seal(folder, **changed):
    about = checksums.read_manifest(folder / "manifest.json", "")
    changed["checksums"] = checksums.compute_checksums(folder, graph.FILES)
    checksums.write_manifest(folder / "manifest.json", about | changed)


@pytest.mark.parametrize("name", ["rows.npy", "scores.npy"])
@pytest.mark.parametrize("fault", ["zeroed", "reversed", "cut"])
def test_a_damaged_graph_is_refused_by_name_and_made_again(
    features, tmp_path, name, fault
):
    job = Job(features, tmp_path / "graph", 5)
    graph.build(job)
    path = job.out / name
    whole = path.read_bytes()
    array = np.load(path)
    if fault == "cut":
        path.write_bytes(whole[:-100])
    else:
        np.save(path, np.zeros_like(array) if fault == "zeroed" else array[::-1].copy())
    with pytest.raises(checksums.Damaged, match=f"{name}: .*03_features"):
        graph.load(job.out)
    graph.build(job)
    assert path.read_bytes() == whole
    graph.load(job.out)


def test_another_k_or_other_features_replace_a_graph(features, tmp_path):
    graph.build(Job(features, tmp_path / "graph", 5))
    graph.build(Job(features, tmp_path / "graph", 3))
    assert graph.load(tmp_path / "graph").k == 3
    other = write(tmp_path / "other", vectors(seed=1), "n")
    with pytest.raises(ValueError, match="not the graph of these features of index"):
        graph.load(tmp_path / "graph", store.load(other))
    graph.build(Job(other, tmp_path / "graph", 3))
    found = graph.load(tmp_path / "graph", store.load(other))
    assert found.rows.tolist() == by_hand(vectors(seed=1), 3)[0].tolist()


def test_a_graph_stops_in_time_and_goes_on(features, tmp_path, monkeypatch):
    job = Job(features, tmp_path / "graph", 4)
    monkeypatch.setenv(launch.STOP_AT, "1")
    with pytest.raises(launch.Stopped, match="after 1 of 6 blocks, the time is over"):
        graph.build(job)
    with pytest.raises(ValueError, match="the graph is not finished; build it again"):
        graph.load(job.out)
    monkeypatch.delenv(launch.STOP_AT)
    graph.build(job)
    assert graph.load(job.out).rows.tolist() == by_hand(vectors(), 4)[0].tolist()


def test_a_missing_graph_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no graph in .*; build it first"):
        graph.load(tmp_path)


def of_rank(rank, world, features, out, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    graph.BLOCK = 10
    graph.build(Job(features, out, 5))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_blocks_and_make_the_same_graph(features, tmp_path, world):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = tmp_path / "graph"
    ranks = [
        context.Process(target=of_rank, args=(rank, world, features, out, port))
        for rank in range(world)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [0] * world
    found = graph.load(out)
    rows, scores = by_hand(vectors(), 5)
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.scores, scores)


def test_the_module_runs_a_job_s_file(features, tmp_path):
    job = Job(features, tmp_path / "graph", 2)
    graph.main([str(job.write())])
    assert json.loads((job.out / "manifest.json").read_text())["complete"]


def test_no_neighbours_are_refused(tmp_path):
    with pytest.raises(ValueError, match="k is 0, not at least 1"):
        Job(tmp_path, tmp_path, 0)


def test_a_graph_without_all_blocks_is_not_complete(features, tmp_path, monkeypatch):
    job, fill = Job(features, tmp_path / "graph", 5), graph._fill

    def forgetful(*given):
        fill(*given)
        store.write_rows(job.out / "done.npy", 2, np.zeros(1))  # its rank was lost

    with monkeypatch.context() as patch:
        patch.setattr(graph, "_fill", forgetful)
        with pytest.raises(RuntimeError, match="1 of 6 blocks are missing, .*block 2"):
            graph.build(job)
    with pytest.raises(ValueError, match="not finished"):
        graph.load(job.out)
    assert len(graph.load(graph.build(job))) == SIZE


def test_ranks_write_no_bytes_but_their_own(features, tmp_path, monkeypatch):
    """A writable map would write whole pages, with old rows of ranks on other machines."""
    load = np.load

    def reading(path, mmap_mode=None, **options):
        assert mmap_mode in (None, "r"), path
        return load(path, mmap_mode, **options)

    monkeypatch.setattr(np, "load", reading)
    job = Job(features, tmp_path / "graph", 5)
    assert np.array_equal(graph.load(graph.build(job)).rows, by_hand(vectors(), 5)[0])
