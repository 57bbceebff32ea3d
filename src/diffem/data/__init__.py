"""What was measured.

- observations.py: folders of memory-mapped arrays, the held-out split, the units of models
- dataset.py: the same in model units
"""

from .dataset import Dataset, Items
from .observations import Observations, evenly, open_array

__all__ = ["Dataset", "Items", "Observations", "evenly", "open_array"]
