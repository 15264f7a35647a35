"""The byte-level BPE tokenizer that a GGUF carries, built as a `tokenizers` one."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers import decoders as d
from tokenizers import models as m
from tokenizers import pre_tokenizers as p

from crossdock.engine.weights.gguf_file import GGUFFile
from crossdock.proto.errors import ModelError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def _split(digits: str) -> p.PreTokenizer:
    """Words, runs of digits, punctuation and white space as Llama 3 and Qwen 2 cut them."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = p.Split(Regex(pattern), behavior="isolated")
    return p.Sequence([cut, p.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre names how text is cut before merging.
_PRE_TOKENIZERS: dict[str, Callable[[], p.PreTokenizer]] = {
    "default": lambda: p.ByteLevel(add_prefix_space=False),
    "gpt-2": lambda: p.ByteLevel(add_prefix_space=False),
    "smollm": lambda: p.Sequence(
        [p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def tokenizer_from_gguf(gguf: GGUFFile) -> Tokenizer:
    """Raises ModelError for other kinds of tokenizer: those need a folder with tokenizer.json."""
    kind = gguf.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"{gguf.path}: tokenizer.ggml.model {kind!r} is not supported; only gpt2")
    pre = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(f"{gguf.path}: tokenizer.ggml.pre {pre!r} is not one of {known}")
    tokens = gguf.require("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.require("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(m.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{gguf.path}: tokenizer: {error}") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = d.ByteLevel()
    types = gguf.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer
