"""Backbone, pool and neck: images -> embeddings; networks save and load themselves."""
