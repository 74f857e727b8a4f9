"""What the trainings of all stages share: configuration, driver, workers, feeds, checkpoints."""
