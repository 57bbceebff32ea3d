"""The measured data.

- observations.py: folders of memory-mapped arrays, the held-out split, model units
- patches.py: large images in patches
- layout.py: the order of axes in users' arrays, and complex numbers
- dataset.py: observations and items in model units
"""

from .dataset import Dataset, Items
from .layout import Layout
from .observations import Observations, evenly, open_array, refuse_unobserved

__all__ = ["Dataset", "Items", "Layout", "Observations", "evenly", "open_array", "refuse_unobserved"]
