"""Rows, table and charts of jobs/ablation.py."""
