"""Dense-and-Implicit Attention that costs next to nothing: fused shared-attention steps for PyTorch."""

from . import checkpoints, functional, memory, sharing
from .attention import CELLS, SharedAttention, create_attention
from .backends import use_backend
from .cell_attention import CellAttention
from .cells import CBAM, DSU, ECA, SE, SRM, Cell, LSTMParameters, StackedLayer
from .sharing import share_attention
from .version import __version__

__all__ = [
    "CBAM",
    "CELLS",
    "DSU",
    "ECA",
    "SE",
    "SRM",
    "Cell",
    "CellAttention",
    "LSTMParameters",
    "SharedAttention",
    "StackedLayer",
    "__version__",
    "checkpoints",
    "create_attention",
    "functional",
    "memory",
    "share_attention",
    "sharing",
    "use_backend",
]
