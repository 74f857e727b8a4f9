"""Rows of measurements, each ours against a peer, in one process, alternating; see docs/results/bench.md.

The plain implementations that stand for a peer where PyPI has none lie in tests/bench: they are also the
oracles of correctness there, and no part of the product.
"""
