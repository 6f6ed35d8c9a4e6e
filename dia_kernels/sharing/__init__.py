"""Sharing attention in any residual network: ``share_attention`` and what belongs to it.

``tracing`` makes graphs of modules, ``tails`` finds the additions that close blocks in them, ``blocks`` the blocks and
stages of a network, ``rewriting`` makes a block's new forward, ``convert`` does it all, ``preserve`` keeps a pretrained
network's output, ``report`` tells.
"""

from .convert import report, share_attention
from .errors import SharingError
from .report import Report
from .rewriting import Adapter, Attend

__all__ = ["Adapter", "Attend", "Report", "SharingError", "report", "share_attention"]
