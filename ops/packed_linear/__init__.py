"""Matrix products with few rows: a token of every hypothesis of a search.

A BLAS arranges the weights anew for every call, which for ten rows takes longer than the product.
Here they are arranged once, by `pack`, which costs about what a few products do.
"""

from ops.packed_linear.cpu import fits, pack, packed_linear, prepare

__all__ = ["fits", "pack", "packed_linear", "prepare"]
