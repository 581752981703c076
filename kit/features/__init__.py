"""Embeddings on disk, and exact search in them."""
