"""Multi-resolution attention as operators: MRA-2, MRA-2-s and the general scheme. Knows torch,
not Transformers.
"""

from .api import (
    mra2_attention,
    mra2_attention_matrix,
    multiresolution_attention,
    multiresolution_attention_matrix,
    select_blocks,
)
from .selection import BlockSelection

__all__ = [
    "BlockSelection",
    "mra2_attention",
    "mra2_attention_matrix",
    "multiresolution_attention",
    "multiresolution_attention_matrix",
    "select_blocks",
]
