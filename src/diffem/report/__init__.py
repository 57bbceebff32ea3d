"""The report of a run.

- pictures.py: what is shown, drawn once and kept in the run folder
- drawing.py: pictures of items, and plots
- page.py: the page, and the table in words
"""
