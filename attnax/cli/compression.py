"""How small compressors make the held-out text: read in pieces, so that memory does not grow with the text."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from attnax.distributed import beat
from attnax.text import Tokenizer
from attnax.text.published_tokenizer import TextTokenizer
from attnax.training.store import StoredTexts

__all__ = ["Sizes", "compressed_sizes", "decode_in_pieces"]

_PIECE = 1 << 16  # tokens that are decoded at a time
_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to ask for the format of gzip


class Sizes(NamedTuple):
    """Numbers of bytes.

    Attributes:
        text: of the text itself.
        gzip: of the file that `gzip -9` makes of it, without a name.
        xz: of the file that `xz -9` makes of it.
    """

    text: int
    gzip: int
    xz: int


def compressed_sizes(pieces: Iterable[bytes]) -> Sizes:
    """The sizes of a text that comes in pieces; one piece is in memory at a time.

    The compressors see the text as a whole: the sizes do not depend on the pieces. Each piece is a sign of life for the
    launcher.

    Example:
        >>> compressed_sizes([b"one and ", b"one and one"])
        Sizes(text=19, gzip=30, xz=76)
    """
    text = gzip_size = xz_size = 0
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, _GZIP), lzma.LZMACompressor(preset=9)
    for piece in pieces:
        text += len(piece)
        gzip_size += len(gzip.compress(piece))
        xz_size += len(xz.compress(piece))
        beat()
    return Sizes(text, gzip_size + len(gzip.flush()), xz_size + len(xz.flush()))


def decode_in_pieces(texts: StoredTexts, tokenizer: TextTokenizer) -> Iterator[bytes]:
    """The bytes of documents.

    The tokens of a `Tokenizer` are bytes, so that a document may be cut anywhere. A published tokenizer decides about
    spaces by the tokens around them, and gets a document as a whole.
    """
    for index in range(len(texts)):
        tokens = texts[index]
        size = _PIECE if isinstance(tokenizer, Tokenizer) else max(1, len(tokens))
        for start in range(0, len(tokens), size):
            yield tokenizer.decode(tokens[start : start + size])
