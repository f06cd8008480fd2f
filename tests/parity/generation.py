"""Golden values of generation by Hugging Face transformers, stored for tests/generation/test_generation_parity.py.

    python tests/parity/generation.py --check    # needs torch and transformers; `make parity` installs them
    python tests/parity/generation.py --write

The file holds five groups. Each is a list of cases (JSON, in Attnax's names) and arrays with one entry for each case:

    cut      logits after the processors that transformers uses for sampling
    table    beam searches of a model of two tables: logits = tables[0][last token] + tables[1][last but one]
    greedy   greedy texts of a tiny GPT-2 and their log-probabilities
    beam     beam searches of that GPT-2
    settings texts of that GPT-2 with only a generation_config.json; a case is that file and its prompt

NumPy draws weights, tables and prompts, so torch's random numbers may change without a new file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn
from transformers import GenerationConfig, GenerationMixin, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

PATH = Path(__file__).parents[1] / "goldens" / "generation.npz"
MAX_BEAMS, MAX_NEW_TOKENS = 4, 9
OPTIONS = {"no_repeat_ngram": "no_repeat_ngram_size"}  # other fields of a Sampler have transformers' names
EARLY_STOPPING = {"heuristic": False, "first": True, "never": "never"}
BIAS = [[3, 1.5], [0, -2.0], [11, -float("inf")]]

Case = dict[str, Any]
Arrays = dict[str, np.ndarray]


class TableModel(PreTrainedModel, GenerationMixin):
    """A model whose logits depend on the last two tokens only."""

    config_class = transformers.PretrainedConfig

    def __init__(self, tables: np.ndarray):
        super().__init__(transformers.PretrainedConfig(vocab_size=tables.shape[-1]))
        self.tables = nn.Parameter(torch.tensor(tables))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        before = torch.roll(input_ids, 1, dims=1)
        return CausalLMOutput(logits=self.tables[0][input_ids] + self.tables[1][before])


def make_gpt2(rng: np.random.Generator) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=29, n_positions=23, n_embd=12, n_head=3, n_layer=2, n_inner=20, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        # The head is tied: larger embeddings repeat the last token, larger biases repeat any other token.
        deviation = 0.3 if "wte" in name or name.endswith("bias") else 1.0
        parameter.data = torch.tensor(rng.normal(mean, deviation, parameter.shape).astype(np.float32))
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that writes each token as a letter; transformers takes stop sequences as text only."""
    vocabulary = {letter: token for token, letter in enumerate(string.ascii_letters[:29])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def options(sampler: Case) -> Case:
    """The fields of a `Sampler` under transformers' names."""
    named = {OPTIONS.get(name, name): value for name, value in sampler.items() if name != "logit_bias"}
    if "logit_bias" in sampler:
        named["sequence_bias"] = [[[token], bias] for token, bias in sampler["logit_bias"]]
    return named


def cut_group(rng: np.random.Generator) -> Arrays:
    ids = rng.integers(0, 5, (4, 11))  # few tokens, so that n-grams repeat
    plain = rng.normal(0, 3, (4, 37)).astype(np.float32)
    plain[3] *= 5  # probabilities down to 1e-40
    logits = np.stack([plain, np.round(plain)])  # rounded: ties, and logits of 0
    samplers: list[Case] = [
        *({"temperature": x} for x in (0.1, 0.7, 1.9)),
        *({"top_k": x} for x in (1, 2, 5, 36, 37, 99)),
        *({"top_p": x} for x in (1e-9, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0)),
        *({"min_p": x} for x in (0.0, 1e-3, 0.1, 0.7, 1.0)),
        *({"repetition_penalty": x} for x in (0.5, 1.3, 5.0)),
        *({"no_repeat_ngram": x} for x in (1, 2, 3)),
        {"logit_bias": BIAS},
        {"temperature": 0.6, "top_k": 9, "top_p": 0.8},
        {"temperature": 1.8, "top_p": 0.95, "min_p": 0.05},
        {"top_k": 12, "min_p": 0.02},
        {"logit_bias": BIAS, "repetition_penalty": 1.7},
        {"repetition_penalty": 1.2, "no_repeat_ngram": 2, "temperature": 0.8, "top_p": 0.9},
        {"logit_bias": BIAS, "repetition_penalty": 1.4, "no_repeat_ngram": 3, "temperature": 1.3}
        | {"top_k": 17, "top_p": 0.97, "min_p": 0.01},
    ]
    # Among equal tokens, the sort decides which ones top_p keeps.
    cases = [
        {"sampler": x, "rounded": rounded} for x in samplers for rounded in (0, 1) if not (rounded and "top_p" in x)
    ]
    model, cut = TableModel(np.zeros((2, 37, 37), np.float32)), []
    for case in cases:
        config = GenerationConfig(do_sample=True, **{"top_k": 0, **options(case["sampler"])})
        processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1])
        cut.append(processors(torch.tensor(ids), torch.tensor(logits[case["rounded"]])).numpy())
    return {"cases": to_json(cases), "ids": ids, "logits": logits, "expected": np.stack(cut)}


def search(model: GenerationMixin, ids: np.ndarray, case: Case, **inputs: Any) -> Arrays:
    """One case's beams, in arrays for MAX_BEAMS of MAX_NEW_TOKENS."""
    count = case["num_beams"]
    out = model.generate(
        torch.tensor(ids),
        custom_generate=GenerationMixin._beam_search,  # even for one beam, which would be greedy search otherwise
        num_beams=count,
        num_return_sequences=count,
        max_new_tokens=case["max_new_tokens"],
        length_penalty=float(case["length_penalty"]),
        early_stopping=EARLY_STOPPING[case["early_stopping"]],
        eos_token_id=case["end_token"] or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options(case["sampler"]),
        **inputs,
    )
    new = out.sequences[:, ids.shape[1] :].numpy()
    written = (out.beam_indices >= 0).numpy()[:, : new.shape[1]]
    shape = len(ids), MAX_BEAMS
    beams = {
        "tokens": np.full((*shape, MAX_NEW_TOKENS), -1, np.int8),
        "lengths": np.full(shape, -1, np.int8),
        "scores": np.full(shape, np.nan, np.float32),
    }
    beams["tokens"][:, :count, : new.shape[1]] = np.where(written, new, -1).reshape(len(ids), count, -1)
    beams["lengths"][:, :count] = written.sum(1).reshape(len(ids), count)
    beams["scores"][:, :count] = out.sequences_scores.reshape(len(ids), count)
    return beams


def table_group(rng: np.random.Generator) -> Arrays:
    tables = rng.normal(0, 1.2, (2, 17, 17)).astype(np.float32)
    tables[0][:, [5, 9]] += 0.6  # tokens that end a text
    ids = rng.integers(0, 17, (3, 4))
    names = "num_beams", "early_stopping", "end_token", "length_penalty"
    grid = itertools.product(range(1, MAX_BEAMS + 1), EARLY_STOPPING, ([], [5], [5, 9]), (-1, 0, 1, 2))
    common = {"sampler": {}, "max_new_tokens": MAX_NEW_TOKENS}
    cases: list[Case] = [common | dict(zip(names, values, strict=True)) for values in grid]
    one = common | {"num_beams": 3, "early_stopping": "heuristic", "end_token": [5], "length_penalty": 1}
    cases += [one | {"max_new_tokens": length, "length_penalty": x} for length in (1, 4) for x in (-1, 1)]
    samplers = [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2},
        {"logit_bias": BIAS},
        {"logit_bias": BIAS, "repetition_penalty": 1.3, "no_repeat_ngram": 2},
    ]
    cases += [one | {"sampler": sampler, "length_penalty": x} for sampler in samplers for x in (0, 1)]
    model = TableModel(tables)
    beams = stack([search(model, ids, case, use_cache=False) for case in cases])
    return {"cases": to_json(cases), "tables": tables, "ids": ids, **beams}


def padded_prompts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    real = np.arange(6) >= 6 - np.array([6, 3, 5])[:, None]
    return np.where(real, rng.integers(1, 29, (3, 6)), 0), real


def write_greedily(model: GPT2LMHeadModel, ids: np.ndarray, real: np.ndarray, case: Case) -> Arrays:
    """One case's texts, lengths and log-probabilities."""
    if case["padded"] and "no_repeat_ngram" in case["sampler"]:
        # transformers counts n-grams of padding too; a row alone has no padding.
        rows = [
            write_greedily(model, ids[row : row + 1, real[row]], real[row : row + 1, real[row]], case | {"padded": 0})
            for row in range(len(ids))
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    sequences = case["stop_sequences"]
    stop_strings = ["".join(string.ascii_letters[token] for token in sequence) for sequence in sequences]
    out = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(real if case["padded"] else np.ones_like(real)).long(),
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=case["end_token"] or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **({"stop_strings": stop_strings, "tokenizer": make_tokenizer()} if sequences else {}),
        **options(case["sampler"]),
    )
    new = out.sequences[:, ids.shape[1] :].numpy()
    log_probs = torch.log_softmax(torch.stack(out.logits, dim=1), dim=-1).numpy()
    texts = {
        "tokens": np.full((len(ids), MAX_NEW_TOKENS), -1, np.int8),
        "lengths": np.zeros(len(ids), np.int8),
        "log_probs": np.zeros((len(ids), MAX_NEW_TOKENS), np.float32),
    }
    for row, tokens in enumerate(new):
        ends = [[token] for token in case["end_token"]] + sequences
        ended = [n for n in range(1, len(tokens) + 1) if any(tokens[:n][-len(x) :].tolist() == x for x in ends)]
        length = texts["lengths"][row] = ended[0] if ended else len(tokens)
        # Without an end token transformers continues rows that stop_strings ended.
        assert not case["end_token"] or (tokens[length:] == 0).all()
        texts["tokens"][row, :length] = tokens[:length]
        texts["log_probs"][row, :length] = log_probs[row, np.arange(length), tokens[:length]]
    return texts


def greedy_group(rng: np.random.Generator, model: GPT2LMHeadModel) -> Arrays:
    ids, real = padded_prompts(rng)
    plain: Case = {"sampler": {}, "end_token": [], "stop_sequences": [], "padded": 0}
    free = write_greedily(model, ids, real, plain)["tokens"].tolist()
    ends, sequences = [free[0][2], free[2][4]], [free[1][2:4], free[0][4:7]]
    penalised = {"logit_bias": BIAS, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    cases = [
        plain,
        plain | {"sampler": {"repetition_penalty": 1.4}},
        plain | {"sampler": {"no_repeat_ngram": 2}},
        plain | {"sampler": {"no_repeat_ngram": 3}},
        plain | {"sampler": penalised},
        plain | {"end_token": ends[:1]},
        plain | {"end_token": ends},
        plain | {"stop_sequences": sequences},
        plain | {"stop_sequences": sequences[:1], "end_token": ends[:1]},
        plain | {"padded": 1},
        plain | {"padded": 1, "end_token": ends},
        plain | {"padded": 1, "sampler": {"logit_bias": BIAS, "repetition_penalty": 1.4}},
        plain | {"padded": 1, "sampler": penalised},
    ]
    texts = stack([write_greedily(model, ids, real, case) for case in cases])
    return {"cases": to_json(cases), "ids": ids, "real": real, **texts}


def beam_group(rng: np.random.Generator, model: GPT2LMHeadModel) -> Arrays:
    ids, real = padded_prompts(rng)
    plain: Case = {"num_beams": 3, "early_stopping": "heuristic", "end_token": [18], "length_penalty": 1}
    plain |= {"sampler": {}, "max_new_tokens": MAX_NEW_TOKENS, "padded": 0}
    cases = [
        plain,
        plain | {"length_penalty": -1},
        plain | {"padded": 1},
        plain | {"padded": 1, "sampler": {"repetition_penalty": 1.4}},
        plain | {"num_beams": 4, "early_stopping": "never", "end_token": [18, 9], "length_penalty": 2},
        plain | {"num_beams": 2, "early_stopping": "first", "end_token": [], "sampler": {"no_repeat_ngram": 2}},
    ]
    masks = [torch.tensor(real if case["padded"] else np.ones_like(real)).long() for case in cases]
    beams = [search(model, ids, case, attention_mask=mask) for case, mask in zip(cases, masks, strict=True)]
    return {"cases": to_json(cases), "ids": ids, "real": real, **stack(beams)}


def settings_group(model: GPT2LMHeadModel) -> Arrays:
    prompt, one = [7, 3, 19, 7], [11]
    ends, most = [18, 9], list(range(0, 29, 2))
    plain: Case = {"eos_token_id": ends, "pad_token_id": 0, "max_length": 13}
    common = plain | {"eos_token_id": [28, 4]}  # tokens that it does not write at once
    search = common | {"num_beams": 3}
    files: list[tuple[list[int], Case]] = [
        (prompt, plain),
        (prompt, {"eos_token_id": ends, "do_sample": False, "temperature": 0.3, "top_k": 2, "max_new_tokens": 5}),
        (prompt, common | {"repetition_penalty": 1.6}),
        (prompt, common | {"suppress_tokens": most}),
        (prompt, common | {"begin_suppress_tokens": most}),
        (prompt, common | {"bad_words_ids": [[18], [5], [7, 24], *([x, y] for x in most for y in range(0, 29, 3))]}),
        (prompt, common | {"sequence_bias": [[[5], 4.0], [[11], -9.0]], "repetition_penalty": 1.3}),
        (prompt, plain | {"min_new_tokens": 4}),
        (prompt, common | {"eos_token_id": most, "min_length": 10}),
        (prompt, common | {"forced_eos_token_id": 28, "max_length": 9}),
        (one, plain | {"forced_eos_token_id": ends, "min_length": 6, "repetition_penalty": 1.2}),
        (prompt, common | {"no_repeat_ngram_size": 2}),
        (one, common | {"forced_bos_token_id": 13, "begin_suppress_tokens": most}),
        (prompt, search | {"length_penalty": -1.0, "eos_token_id": ends}),
        (prompt, search | {"length_penalty": 2.0, "suppress_tokens": most, "num_return_sequences": 2}),
        (prompt, search | {"repetition_penalty": 1.5, "begin_suppress_tokens": most, "min_length": 9}),
        (prompt, search | {"early_stopping": True, "num_return_sequences": 3, "eos_token_id": ends}),
    ]
    cases, texts = [], []
    for ids, file in files:
        model.generation_config = GenerationConfig.from_dict(file)
        new = model.generate(torch.tensor([ids]))[:, len(ids) :].numpy()
        tokens = np.full((MAX_BEAMS, 13), -1, np.int8)
        tokens[: len(new), : new.shape[1]] = new
        cases.append({"ids": ids, "file": file})
        texts.append(tokens)
    return {"cases": to_json(cases), "tokens": np.stack(texts)}


def to_json(cases: list[Case]) -> np.ndarray:
    return np.array(json.dumps(cases))


def stack(entries: list[Arrays]) -> Arrays:
    return {name: np.stack([entry[name] for entry in entries]) for name in entries[0]}


def make_goldens() -> Arrays:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gpt2 = make_gpt2(np.random.default_rng(15))
    groups = {
        "cut": cut_group(np.random.default_rng(2)),
        "table": table_group(np.random.default_rng(8)),
        "greedy": greedy_group(np.random.default_rng(4), gpt2),
        "beam": beam_group(np.random.default_rng(5), gpt2),
        "settings": settings_group(gpt2),
        "gpt2": {name: parameter.detach().numpy() for name, parameter in gpt2.named_parameters()},
    }
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}


def differences(stored: Arrays, made: Arrays) -> list[str]:
    """Messages about the differences of two sets of arrays."""
    found = [f"{name} is in one of them only" for name in stored.keys() ^ made.keys()]
    for name in stored.keys() & made.keys():
        old, new = stored[name], made[name]
        if old.shape != new.shape or old.dtype.kind != new.dtype.kind:
            found.append(f"{name} is {new.dtype}{new.shape}, stored {old.dtype}{old.shape}")
        elif old.dtype.kind != "f":
            if (old != new).any():
                found.append(f"{name} differs in {(old != new).sum()} of {old.size} places")
        elif not np.allclose(old, new, rtol=1e-5, atol=1e-5, equal_nan=True):
            found.append(f"{name} differs by up to {np.nanmax(np.abs(old - new))}")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Golden values of generation by Hugging Face transformers.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compute the values again, and compare the file with them")
    mode.add_argument("--write", action="store_true", help="compute the values again, and store them")
    arguments = parser.parse_args()
    made = make_goldens()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    count = sum(len(json.loads(str(array))) for name, array in made.items() if name.endswith("/cases"))
    if arguments.write:
        PATH.parent.mkdir(exist_ok=True)
        np.savez_compressed(PATH, **made)
        print(f"{count} cases of {versions} are in {PATH}.")
        return
    if not PATH.exists():
        sys.exit(f"{PATH} does not exist. Run with --write.")
    with np.load(PATH) as stored:
        found = differences(dict(stored), made)
    if found:
        sys.exit("\n".join([f"{PATH} is not what {versions} gives:", *found]))
    print(f"{count} cases of {versions} are as stored in {PATH}.")


if __name__ == "__main__":
    main()
