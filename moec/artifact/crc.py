"""CRC-32 of two texts, one behind the other, from those of each: zips that hold zips are read once."""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
"""Of CRC-32 (ISO 3309), without its highest term; bits from the highest power down."""
_ONE, _BYTE = 1 << 31, 1 << 23
"""The polynomials 1 and x⁸."""


def combined(first: int, second: int, size: int) -> int:
    """The CRC-32 of a text and of ``size`` bytes behind it.

    CRC-32 is linear: bytes behind a text multiply its remainder by x⁸ each (R. N. Williams, A Painless Guide to CRC
    Error Detection Algorithms, 1993; zlib's ``crc32_combine``).

    Args:
        first: CRC-32 of the text.
        second: Of the bytes behind it.
        size: How many those are.
    """
    power, base = _ONE, _BYTE
    while size:
        if size & 1:
            power = _times(power, base)
        base = _times(base, base)
        size >>= 1
    return _times(power, first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
