"""What the explorer shows: a corpus by its quality, and a model at its dials."""
