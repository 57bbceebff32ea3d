"""What needs clean data: data sets to corrupt, and distances to the truth. No run of a user's own needs it.

- datasets.py: clean data sets, and observations made of them
- metrics.py: distances; evaluation.py: a run against clean data
"""
