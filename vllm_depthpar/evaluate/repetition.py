"""How much an answer repeats itself. Plain arithmetic over token ids."""

from __future__ import annotations

from collections.abc import Sequence

# A loop says the same thing so often, and is so long altogether.
_TIMES = 3
_TOKENS = 24


def repeated_share(tokens: Sequence[int], size: int = 4) -> float:
    """Compute the share of n-grams that were there before: 1 - different / all.

    That is seq-rep-n of unlikelihood training (arXiv 1908.04319, section 6), 0 where nothing
    repeats. It grows with the length: compare answers of like lengths.

    Args:
        tokens: ids; of fewer than `size` the share is 0.
        size: n.
    """
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Say whether the end is one piece over and over: three times or more, and 24 tokens or more
    altogether. What changes from one time to the next, as a number that is counted up, is no loop.
    """
    for period in range(1, len(tokens) // _TIMES + 1):
        alike = period
        while alike < len(tokens) and tokens[-1 - alike] == tokens[-1 - alike + period]:
            alike += 1
        if alike >= max(_TIMES * period, _TOKENS):
            return True
    return False


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which two answers begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
