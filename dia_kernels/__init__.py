"""Dense-and-Implicit Attention that costs next to nothing: fused shared-attention steps for PyTorch."""

from . import functional
from .attention import SharedAttention
from .cells import LSTMParameters, StackedLayer
from .version import __version__

__all__ = ["LSTMParameters", "SharedAttention", "StackedLayer", "__version__", "functional"]
