"""CRC-32 of a whole from the CRC-32s of its parts, so that blocks can be summed in any order by any thread."""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320
"""The CRC-32 polynomial, bits reflected: the highest power is the lowest bit."""
_ONE = 0x80000000
_X_TO_THE_8 = 0x00800000


def crc32_join(first: int, second: int, second_length: int) -> int:
    """The CRC-32 of two parts in a row: shifting by `second_length` bytes is multiplying by x**(8 n)."""
    return _multiply(power_of_x8(second_length), first) ^ second


def crc32_of_remainder(remainder: int, length: int) -> int:
    """The CRC-32 of `length` bytes from their plain remainder, which lacks the inversions before and after."""
    return remainder ^ _multiply(power_of_x8(length), 0xFFFFFFFF) ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def power_of_x8(exponent: int) -> int:
    """x**(8 * exponent) modulo the polynomial, by squaring."""
    result, square = _ONE, _X_TO_THE_8
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def _multiply(left: int, right: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC polynomial."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return product
