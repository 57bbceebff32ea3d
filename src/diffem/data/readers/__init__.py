"""Converts users' files to an observation folder, and results back to files.

- importing.py: finds the files, and writes the folder
- exporting.py: writes results in the format, and under the names, of the files that were read
- images.py, fits.py, nifti.py, arrays.py, tables.py: one family of formats each; imported on demand
- source.py: their common interface, and limits that protect against hostile files
"""
