"""What was measured.

- observations.py: folders of memory-mapped arrays, the held-out split, the units of models
- patches.py: large images in parts
- layout.py: the axes of arrays as people have them, and complex numbers
- dataset.py: the same in model units
"""

from .dataset import Dataset, Items
from .layout import Layout
from .observations import Observations, evenly, open_array, refuse_unobserved

__all__ = ["Dataset", "Items", "Layout", "Observations", "evenly", "open_array", "refuse_unobserved"]
