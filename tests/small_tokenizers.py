"""Four tiny tokenizers of the kinds that published checkpoints have."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["def f(x): return x é ü 日本 😀\n Once upon a time, there was a tree.\n"] * 3
UNKNOWN, START, END = 0, 1, 2
SPECIAL = ["<unk>", "<s>", "</s>"]
AROUND = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)])


def byte_level():
    """Like GPT-2 and Llama 3: a character may be spread over several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainer(trainers.BpeTrainer, 290, initial_alphabet=alphabet))
    return tokenizer


def unigram():
    """Like sentencepiece: spaces are letters, and the first one is left out."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXT, trainer(trainers.UnigramTrainer, 60, unk_token="<unk>"))
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]  # in another order in each run
    tokenizer.model = models.Unigram([*map(tuple, learned[:3]), *sorted(map(tuple, learned[3:]))], unk_id=UNKNOWN)
    return tokenizer


def byte_fallback():
    """Like Llama 2: a character without a token is spelled in bytes, which decode only all together."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(["def f(x): return x Once upon a time"] * 3, trainer(trainers.BpeTrainer, 50))
    made = json.loads(learned.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(made["vocab"]) - set(SPECIAL))]
    vocabulary = {name: token for token, name in enumerate(names)}
    merges = [tuple(merge) for merge in made["merges"]]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
    return tokenizer


def word_pieces():
    """Like BERT: lower case, and spaces between tokens, but none before a continuation or a full stop."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainer(trainers.WordPieceTrainer, 60))
    return tokenizer


def trainer(kind, size, **options):
    return kind(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)


KINDS = [byte_level, unigram, byte_fallback, word_pieces]
TOKENIZERS = {kind: kind() for kind in KINDS}


def copy_of(kind, around=None):
    """A copy of a tokenizer, with a post-processor that adds tokens around a text."""
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZERS[kind].to_str())
    if around is not None:
        tokenizer.post_processor = around
    return tokenizer


def template(*pieces):
    """A post-processor of a tokenizer.json that the library `tokenizers` reads, but does not make."""
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [A], "special_tokens": {}}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
PANICS = [
    {"post_processor": template({"SpecialToken": {"id": "[X]", "type_id": 0}}, A)},  # no id for [X]
    {"post_processor": template(B)},  # needs a second text
    {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}},  # strips two letters from a word of one
]


def panicking(fields):
    """A tokenizer of one word for which the library `tokenizers` panics."""
    made = json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(made | fields))
