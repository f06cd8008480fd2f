"""Text and tokens: tokenizers, text from tokens piece by piece, and models that write text.

Names are loaded when first used: a tokenizer needs no Flax.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.text.codec import ByteDecoder as ByteDecoder
    from attnax.text.codec import Codec as Codec
    from attnax.text.codec import Decoder as Decoder
    from attnax.text.codec import TextStream as TextStream
    from attnax.text.codec import spell as spell
    from attnax.text.model import TextModel as TextModel
    from attnax.text.model import Translator as Translator
    from attnax.text.model import prompt_array as prompt_array
    from attnax.text.packing import Packed as Packed
    from attnax.text.packing import pack as pack
    from attnax.text.published import is_published as is_published
    from attnax.text.published import open_published as open_published
    from attnax.text.published_codec import PublishedCodec as PublishedCodec
    from attnax.text.published_tokenizer import PublishedTokenizer as PublishedTokenizer
    from attnax.text.published_tokenizer import TextTokenizer as TextTokenizer
    from attnax.text.published_tokenizer import find_tokenizer as find_tokenizer
    from attnax.text.published_tokenizer import make_tokenizer as make_tokenizer
    from attnax.text.published_tokenizer import open_tokenizer as open_tokenizer
    from attnax.text.tokenizer import DOCUMENT as DOCUMENT
    from attnax.text.tokenizer import NUM_BYTE_TOKENS as NUM_BYTE_TOKENS
    from attnax.text.tokenizer import ByteCodec as ByteCodec
    from attnax.text.tokenizer import SpecialTokens as SpecialTokens
    from attnax.text.tokenizer import Tokenizer as Tokenizer
    from attnax.text.tokenizer import byte_tokenizer as byte_tokenizer
    from attnax.text.tokenizer import train_bpe as train_bpe
