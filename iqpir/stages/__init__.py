"""The three trainings: what is frozen, one optimisation step, its losses and its metrics."""
