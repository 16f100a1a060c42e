"""Matrix products with few rows: a token of every hypothesis of a search."""

from ops.packed_linear.dispatch import packed_linear, packed_weights

__all__ = ["packed_linear", "packed_weights"]
