"""The loop, its state, checkpoints, order, optimiser and ranks; runs alone, under torchrun or under Ray."""
