"""Hashes of samples, and the clusters of those that are alike."""
