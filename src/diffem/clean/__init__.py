"""Tools for clean data: data sets to corrupt, and distances to the truth. Not needed for runs on a user's own data.

- datasets.py: clean data sets, and observations simulated from them
- metrics.py: distances; evaluation.py: compares a run with clean data
"""
