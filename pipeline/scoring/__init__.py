"""Scores, their tables, their calibration, and whether they have drifted."""
