"""Sums of floats that do not depend on the order of their terms, so that any number of ranks has the same sum, bit for bit.

A float is written as an integer of LIMBS digits of 32 bits, in units of 2^-64. Digits are added up as int64, which is exact.
"""

import torch
from torch import Tensor

LIMBS = 6
# Terms must be smaller than this; what a term has below 2^-64 is cut off.
LIMIT = 2.0**128
# From 2^-128, with which the first digit of any term is 0, to 2^64.
POWERS = [2.0 ** (32 * place) for place in range(-4, 3)]


def digits(terms: Tensor) -> Tensor:
    """Return the digits of each term, most significant first.

    Digits of up to 2^31 terms may be added up. The digits of a term that is nan, infinite or too large are 0: check such terms
    with `is_term`.

    Args:
        terms: tensor (...) of float64.

    Returns:
        A tensor (..., LIMBS) of int64; all digits of a negative term are negative or 0.
    """
    terms = torch.where(is_term(terms), terms, 0)
    # All of this is exact: scaling by powers of two, cutting off, and the difference, whose bits are some of the term's.
    cut = torch.trunc(torch.stack([terms * power for power in POWERS], -1))
    return (cut[..., 1:] - cut[..., :-1] * 2.0**32).long()


def is_term(terms: Tensor) -> Tensor:
    """Return which terms can be added up.

    Args:
        terms: tensor of any shape (*,), float64.

    Returns:
        A tensor of the same shape (*,), bool.
    """
    return terms.abs() < LIMIT


def total(sums: Tensor) -> list[float]:
    """Return the sums as floats, each rounded once.

    Args:
        sums: sums of digits, (n, LIMBS) int64.
    """
    return [sum(int(d) << 32 * place for place, d in enumerate(reversed(row))) / (1 << 64) for row in sums.tolist()]
