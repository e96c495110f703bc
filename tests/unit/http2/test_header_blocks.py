"""Header blocks that come again are known, and mean what a decoder without a memory says."""

from __future__ import annotations

import hypothesis.strategies as st
from hpack import Decoder, Encoder
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given

from wsgi_ts.http2.header_blocks import HeaderBlocks, leaves_table

NAMES = st.sampled_from([":path", ":method", "content-length", "te", "x-request-id", "n" * 200])
VALUES = st.sampled_from(["POST", "trailers", "/t.T/Echo", "1", "22", "v" * 300])
#: A field, and whether it is a literal that must not go into the table.
FIELDS = st.tuples(NAMES, VALUES, st.booleans())


@given(st.lists(st.lists(FIELDS, max_size=5), max_size=12), st.booleans())
def test_a_block_means_the_same_the_second_time(heads: list[list[tuple[str, str, bool]]], huffman: bool) -> None:
    encoder, memoryless, blocks = Encoder(), Decoder(), HeaderBlocks()
    for head in heads:
        fields = [(NeverIndexedHeaderTuple if never else HeaderTuple)(name, value) for name, value, never in head]
        for block in [encoder.encode(fields, huffman=huffman) for _ in range(2)]:
            expected = [(bytes(name), bytes(value)) for name, value in memoryless.decode(block, raw=True)]
            assert blocks.fields(block) == expected


def test_literals_without_indexing_are_known_and_others_change_what_is_known() -> None:
    encoder, blocks = Encoder(), HeaderBlocks()
    literal = encoder.encode([NeverIndexedHeaderTuple("content-length", "1005"), HeaderTuple(":method", "POST")])
    assert leaves_table(literal)
    assert blocks.fields(literal) is blocks.fields(literal)
    indexing = encoder.encode([HeaderTuple("x-first", "1")])
    assert not leaves_table(indexing)
    known = blocks.fields(literal)
    blocks.fields(indexing)
    assert blocks.fields(literal) is not known
    assert not leaves_table(b"\x3f\xe1\x1f")  # another size of the table


def test_more_heads_than_are_kept_are_read_all_the_same() -> None:
    encoder, blocks = Encoder(), HeaderBlocks()
    for number in range(500):
        block = encoder.encode([NeverIndexedHeaderTuple("x-request-id", str(number))])
        assert blocks.fields(block) == [(b"x-request-id", str(number).encode())]
