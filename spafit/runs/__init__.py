"""A run on disk: its folder, record, log and checkpoints."""
