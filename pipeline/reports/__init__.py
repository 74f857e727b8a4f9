"""The pages and charts of jobs/report.py."""
