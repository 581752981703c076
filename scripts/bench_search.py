"""Rows of `bench.py search`: neighbours, tags, reranking and the metric, all of their suites."""

import bench_knn
import bench_kreciprocal
import bench_rerank

ROWS = [*bench_knn.ROWS, *bench_kreciprocal.ROWS, *bench_rerank.ROWS]
