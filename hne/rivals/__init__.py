"""Networks with early exits, which the HNE paper's Figure 6 compares HNEs with."""

from .block_exits import BlockExits
from .early_exit import EarlyExitNetwork
from .msdnet import MSDNet
