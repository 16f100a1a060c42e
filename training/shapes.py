"""Few shapes in the place of many: kernels, graphs and freed memory then serve again."""


def rounded_up(count: int, per_octave: int) -> int:
    """The next of so many numbers to the octave, a power of two; small ones stay.

    >>> [rounded_up(count, per_octave=8) for count in (1, 15, 17, 100, 1000)]
    [1, 15, 18, 104, 1024]
    """
    grain = 1 << max(count.bit_length() - per_octave.bit_length(), 0)
    return -(-count // grain) * grain
