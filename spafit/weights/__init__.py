"""Pre-trained weights and adapters: from the hub or a folder into a model, and back to disk."""
