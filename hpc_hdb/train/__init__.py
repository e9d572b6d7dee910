"""The two loops of training, and what they work on: models, data, merges, checkpoints."""
