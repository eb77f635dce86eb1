"""What a run added to its base: how much of it, what merging loses, and what was forgotten."""
