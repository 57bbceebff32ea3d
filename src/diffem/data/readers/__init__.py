"""From the files that people have to an observation folder, and back.

- importing.py: which files are read, and the folder that is written
- exporting.py: results in the format, and under the names, of the files that were read
- images.py, fits.py, nifti.py, arrays.py, tables.py: a family of formats each; imported where they are needed
- source.py: what these have in common, and the limits against hostile files
"""
