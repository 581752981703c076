"""Landmark retrieval: image lists, training, features, search, rerank, submission."""

__version__ = "0.1.0"
