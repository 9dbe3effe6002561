"""The tokenizer of a GGUF file: its kinds of tokens, and each splitter as its model was trained with."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.checkpoints.gguf import convert
from engine.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from engine.checkpoints.weights import Checkpoint
from tests.engine.gguf_files import TEXT_KEYS, random_weights, write


def test_the_tokenizer_is_rebuilt_with_its_kinds_of_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama"), {"tokenizer.chat_template": "{{ messages }}"})
    checkpoint = Checkpoint.open(convert(path, tmp_path / "cache"))
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    assert tokenizer.encode("ab a12<tool><|end|>").ids == [4, 6, 7, 8, 9, 0]
    assert tokenizer.decode([4, 6, 9, 0]) == "ab a<tool>"  # <tool> is text of the user's, <|end|> is control
    assert tokenizer.token_to_id("[PAD0]") is None


def test_a_bos_is_added_where_the_file_says_so() -> None:
    plain = build_tokenizer(TEXT_KEYS)
    adding = build_tokenizer({**TEXT_KEYS, "tokenizer.ggml.add_bos_token": True})
    llama = build_tokenizer({**TEXT_KEYS, "tokenizer.ggml.pre": "llama-bpe"})
    assert [each.encode("a").ids for each in (plain, adding, llama)] == [[1], [0, 1], [0, 1]]
    assert adding.encode("a", add_special_tokens=False).ids == [1]


SPLITS = [
    ("smollm", "Hello  12 x", ["Hello", "ĠĠ", "1", "2", "Ġx"]),
    ("gpt-2", "Hello  12 x", ["Hello", "Ġ", "Ġ12", "Ġx"]),
    ("llama-bpe", "I'LL 12345\n\n x", ["I", "'LL", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
    ("qwen2", "I'LL 12345\n\n x", ["I", "'LL", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx"]),
    ("default", "a+=b 12345", ["a", "+=", "b", "Ġ", "123", "45"]),
]


@pytest.mark.parametrize(("pre", "given_text", "pieces"), SPLITS)
def test_each_known_splitter_splits_as_defined(pre: str, given_text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str(given_text)] == pieces


@settings(deadline=None)  # the first one imports transformers
@given(st.text(alphabet="aZ é'sLl12 \n\t٣½+<。😀", max_size=30))
def test_qwen2_splits_as_transformers_does(sample: str) -> None:
    from transformers import Qwen2Tokenizer

    oracle = Qwen2Tokenizer(vocab={"a": 0}, merges=[])._tokenizer.pre_tokenizer
    ours = PRE_TOKENIZERS["qwen2"]()
    assert ours.pre_tokenize_str(sample) == oracle.pre_tokenize_str(sample)
