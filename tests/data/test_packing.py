"""Packing loses no token but a lonely last one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.batches import Encoded
from palimpsest.data.packing import pack

DOCUMENTS = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=12).map(lambda ids: Encoded(tuple(ids), 1, len(ids))), max_size=10
)


def test_documents_run_on_from_row_to_row():
    rows = pack([Encoded((1, 2, 3, 0), 1, 4), Encoded((4, 5, 0), 2, 3), Encoded((6, 0), 1, 2)], length=4)
    assert rows == [Encoded((1, 2, 3, 0), 1, 4), Encoded((4, 5, 0, 6), 1, 4)]  # the last 0 stood alone


@settings(deadline=None, max_examples=200)
@given(DOCUMENTS, st.integers(2, 9))
def test_every_token_stands_once_and_in_order(documents, length):
    tokens = [token for document in documents for token in document.ids]
    rows = pack(iter(documents), length=length)
    packed = [token for row in rows for token in row.ids]
    lonely = len(tokens) % length == 1
    assert packed == (tokens[:-1] if lonely else tokens)
    assert all(len(row.ids) == length for row in rows[:-1])
    assert all(2 <= len(row.ids) <= length for row in rows)
    assert all((row.start, row.stop) == (1, len(row.ids)) for row in rows)
