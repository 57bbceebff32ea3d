"""The report of a run.

- pictures.py: the arrays to show, drawn once and kept in the run folder
- drawing.py: pictures of items, and plots
- page.py: the HTML page, and the table as text
"""
