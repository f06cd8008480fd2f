"""Each option of a call stands in one TypedDict and in the public signatures, and each public call hands it on."""

import inspect
import types

import numpy as np
import pytest

from attnax import (
    DecoderBlock,
    EncoderBlock,
    MultiHeadAttention,
    Transformer,
    TransformerDecoder,
    TransformerEncoder,
    TransformerLM,
    VisionTransformer,
)
from attnax.generation import make_request
from attnax.models import MaskedLM, SentenceEncoder, lm, seq2seq
from attnax.models.masked import MaskedOptions
from attnax.models.seq2seq import TransformerOptions
from attnax.models.transformer import CachedOptions, DecoderOptions, EncoderOptions
from attnax.models.vision import VisionOptions
from attnax.models.writing import PromptOptions, WriteOptions
from attnax.nn import Output
from attnax.nn._run import Mode
from attnax.nn.attention import MultiHeadOptions
from attnax.nn.blocks import DecoderBlockOptions, EncoderBlockOptions

IN_RUN = {"self_attn_kv_cache": "cache", "layer_kv_caches": "caches"}
# A public call, the dictionary of its options, the options that the call lacks, and the arguments that it has beside.
CALLS = [
    (MultiHeadAttention.__call__, MultiHeadOptions, set(), set()),
    (
        MultiHeadAttention.attention_weights,
        MultiHeadOptions,
        {"kv_cache", "mix_values", "deterministic", "rngs"},
        set(),
    ),
    (EncoderBlock.__call__, EncoderBlockOptions, set(), set()),
    (DecoderBlock.__call__, DecoderBlockOptions, set(), {"encoder_output"}),
    (TransformerEncoder.__call__, EncoderOptions, set(), set()),
    (TransformerDecoder.__call__, DecoderOptions, set(), set()),
    (TransformerLM.__call__, CachedOptions, set(), set()),
    (MaskedLM.__call__, MaskedOptions, set(), set()),
    (SentenceEncoder.__call__, Mode, set(), {"padding_mask", "token_type_ids"}),
    (VisionTransformer.__call__, VisionOptions, set(), set()),
    (Transformer.__call__, TransformerOptions, set(), set()),
]
WRITERS = [
    (TransformerLM.generate, PromptOptions, set(), {"draft", "num_draft_tokens", "return_caches"}),
    (TransformerLM.prefill, PromptOptions, {"sampler", "key", "end_token", "stop_sequences", "num_samples"}, set()),
    (
        TransformerLM.beam_search,
        PromptOptions,
        {"key", "num_samples"},
        {"num_beams", "length_penalty", "early_stopping"},
    ),
    (
        Transformer.generate,
        WriteOptions,
        {"padding_mask"},
        {"draft", "num_draft_tokens", "temperature", "source_padding_mask"},
    ),
    (
        Transformer.beam_search,
        WriteOptions,
        {"padding_mask", "key", "num_samples"},
        {"num_beams", "length_penalty", "early_stopping", "source_padding_mask"},
    ),
]
ARRAYS = ("self", "x", "input_ids", "images", "source_ids", "target_ids", "prompt_ids")
COUNTS = ("max_new_tokens", "max_length", "start_token")


def options_of(call):
    """Names and annotations of the arguments that are options."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name: str(p.annotation) for p in parameters if p.name not in (*ARRAYS, *COUNTS)}


def listed(options):
    return {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()}


def name_of(value):
    return getattr(value, "__qualname__", None)


@pytest.mark.parametrize(("call", "options", "lacks", "beside"), CALLS, ids=name_of)
def test_a_call_names_the_options_of_its_dictionary(call, options, lacks, beside):
    named = {IN_RUN.get(name, name): hint for name, hint in options_of(call).items()}
    assert named.keys() - beside == listed(options).keys() - lacks
    assert {name: hint for name, hint in named.items() if name not in beside}.items() <= listed(options).items()


WITHOUT_RUN = MultiHeadAttention.attention_weights, SentenceEncoder.__call__


@pytest.mark.parametrize("call", [call for call, *_ in CALLS if call not in WITHOUT_RUN], ids=name_of)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_call_hands_each_option_to_run(call):
    handed = {}

    def run(*arrays, **options):
        handed.update(options)
        return (None, None) if call is MultiHeadAttention.__call__ else Output(None, None, {})

    given = {name: object() for name in options_of(call)}
    arrays = [None] * (len(inspect.signature(call).parameters) - len(given) - 1)
    call(types.SimpleNamespace(run=run, head=None), *arrays, **given)
    assert handed == {IN_RUN.get(name, name): value for name, value in given.items()}


@pytest.mark.parametrize(("call", "options", "lacks", "beside"), WRITERS, ids=name_of)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_call_that_writes_names_the_options_of_its_dictionary_and_hands_them_on(
    monkeypatch, call, options, lacks, beside
):
    named = options_of(call)
    assert named.keys() - beside == listed(options).keys() - lacks

    handed = {}

    def hand(writer, prompt_ids, draft=None, **options):
        handed.update(options)

    monkeypatch.setattr(lm if call.__qualname__.startswith("TransformerLM") else seq2seq, call.__name__, hand)
    given = {name: object() for name in named.keys() - {"temperature", "draft"}}
    ids, model = np.zeros((1, 2), int), types.SimpleNamespace(_writer=lambda *others: None)
    counts = {name: 1 for name in inspect.signature(call).parameters if name in COUNTS}
    call(model, ids, **counts, **given)
    given = {name: value for name, value in given.items() if name != "source_padding_mask"}
    assert handed == given | ({"max_new_tokens": 1} if counts else {})


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_option_that_no_call_has_is_refused():
    for module in (MultiHeadAttention, EncoderBlock, TransformerEncoder, TransformerDecoder):
        run = module._attend if module is MultiHeadAttention else module.run
        with pytest.raises(TypeError, match=rf"{module.__name__}: options must be among .*score_mod.*; got masc"):
            run(None, None, {"masc": 1}) if module is MultiHeadAttention else run(None, None, masc=1)
    with pytest.raises(TypeError, match=r"make_request: options must be among .*sampler.*; got seed"):
        make_request(np.zeros((1, 2), int), vocab_size=3, max_new_tokens=1, seed=0)
