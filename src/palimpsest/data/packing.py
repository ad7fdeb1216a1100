"""Documents joined end to end and cut into rows of one length, so that no training step is spent on padding."""

from collections.abc import Iterable

from palimpsest.data.batches import Encoded


def pack(encoded: Iterable[Encoded], *, length: int) -> list[Encoded]:
    """Concatenate the rows' tokens and cut them into rows of `length` tokens, every token but a row's first a target.

    A last row of fewer than two tokens is dropped. Encode with `end=True`, so that documents stay told apart.
    """
    tokens = [token for row in encoded for token in row.ids]
    rows = (tuple(tokens[first : first + length]) for first in range(0, len(tokens), length))
    return [Encoded(row, 1, len(row)) for row in rows if len(row) > 1]
