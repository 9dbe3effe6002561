"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face tokenizer.json.

A GGUF file holds the vocabulary and merges, but of the splitting that comes before them only a name,
`tokenizer.ggml.pre`. The names' meanings are llama.cpp's (`llama-vocab.cpp`, one list of regular expressions each),
spelled here as the original tokenizers spell them. A wrong split changes ids silently, so an unknown name is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import InvalidInput

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types; 1 is a normal token
_CASELESS_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Each pattern in turn cuts the pieces of the one before; what it does not match stays a piece."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_then_words() -> pre_tokenizers.PreTokenizer:
    """Every digit alone: this is what sets SmolLM apart from GPT-2, also after a run of spaces."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _splits(rf"{_CASELESS_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": lambda: _splits(rf"{_CASELESS_WORDS}|\p{{N}}|{_REST}"),
    "smollm": _digits_then_words,
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises InvalidInput for a model or splitter not known here, or lists that do not fit together."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InvalidInput(
            "model",
            f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' (byte-level BPE); "
            "use the model's Hugging Face directory, which has its tokenizer.json",
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise InvalidInput("model", f"tokenizer.ggml.pre {pre!r} is not known; known: {', '.join(PRE_TOKENIZERS)}")
    tokens, types = _tokens(metadata)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    try:
        # Llama 3 takes a piece that is a token as it is, merges or not.
        tokenizer = Tokenizer(models.BPE(vocabulary, _merges(metadata), ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the only class the tokenizers package raises
        raise InvalidInput("model", f"the merges do not fit the vocabulary: {error}") from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for i, token in enumerate(tokens):
        if types[i] == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif types[i] == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos = special_id(metadata, "bos")
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the named special tokens and the chat template."""
    tokens, _ = _tokens(metadata)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        i = special_id(metadata, key)
        if i is not None:
            config[f"{name}_token"] = tokens[i]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def special_id(metadata: Mapping[str, Any], key: str) -> int | None:
    """The id of `tokenizer.ggml.{key}_token_id`, or None where the file has none."""
    i = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(_tokens(metadata)[0]):
        raise InvalidInput("model", f"tokenizer.ggml.{key}_token_id {i!r} is not a token")
    return i


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or len(set(tokens)) != len(tokens):
        raise InvalidInput("model", "tokenizer.ggml.tokens is not a list of different tokens")
    if types is None:
        return tokens, [1] * len(tokens)
    if not hasattr(types, "tolist") or len(types) != len(tokens):
        raise InvalidInput("model", f"tokenizer.ggml.token_type is not a list of {len(tokens)} numbers")
    return tokens, types.tolist()


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges", [])
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else []
    if len(pairs) != len(merges) or any(len(pair) != 2 for pair in pairs):
        raise InvalidInput("model", "tokenizer.ggml.merges is not a list of 'left right' texts")
    return [(left, right) for left, right in pairs]
