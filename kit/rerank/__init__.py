"""Pure functions on tensors that turn neighbours and tags into better scores."""
