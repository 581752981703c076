"""Image lists -> checkpoints, stage by stage."""
