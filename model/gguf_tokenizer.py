"""The tokenizer that GGUF metadata describes. Imports no torch.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file names its
pre-tokenizer (`tokenizer.ggml.pre`) but does not carry it, so the splits are listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from crossdock.model.gguf_file import GGUFFile, open_gguf
from crossdock.model.tokenizer_parts import TokenizerParts, surround
from crossdock.proto.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

_WORDS_LIKE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS_LIKE_LLAMA3 % "1,3"
_QWEN2 = _WORDS_LIKE_LLAMA3 % "1"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r"})
_GPT2 = frozenset({"default", "gpt-2", "gpt2", ""})
_NFC = frozenset({"qwen2", "deepseek-r1-qwen"})


def read_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Raises ModelError naming the key that is missing, wrong or not supported."""
    gguf = open_gguf(path)
    kind = gguf.require("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{path}: tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama"
        )
    try:
        tokenizer = _byte_level(gguf) if kind == "gpt2" else _sentencepiece(gguf)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: not a usable tokenizer: {error}") from error
    _add_whole_tokens(tokenizer, gguf)
    special = _special_tokens(gguf)
    add_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    add_eos = gguf.metadata.get("tokenizer.ggml.add_eos_token", False)
    before = special.get("bos_token") if add_bos else None
    after = special.get("eos_token") if add_eos else None
    if before or after:
        surround(tokenizer, before, after)
    return TokenizerParts(tokenizer, _templates(gguf), special)


def _byte_level(gguf: GGUFFile) -> Tokenizer:
    merges = [_pair(merge) for merge in gguf.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(_vocab(gguf), merges))
    name = str(gguf.metadata.get("tokenizer.ggml.pre", "default"))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words_and_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split: list[Any]
    if name in _SPLITS:
        split = [pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated"), bytes_only]
    elif name in _DIGIT_BY_DIGIT:
        split = [pre_tokenizers.Digits(individual_digits=True), words_and_bytes]
    elif name in _GPT2:
        split = [words_and_bytes]
    else:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.pre {name!r} is not supported")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GGUFFile) -> Tokenizer:
    vocab = _vocab(gguf)
    if "tokenizer.ggml.merges" in gguf.metadata:
        merges = [_pair(merge) for merge in gguf.metadata["tokenizer.ggml.merges"]]
    else:
        merges = _merges_of(vocab, gguf.require("tokenizer.ggml.scores"))
    unknown = gguf.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    bpe = models.BPE(
        vocab,
        merges,
        unk_token=gguf.require("tokenizer.ggml.tokens")[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _vocab(gguf: GGUFFile) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(gguf.require("tokenizer.ggml.tokens"))}


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _merges_of(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Those of a SentencePiece vocabulary: all splits into two tokens, best-scored first."""
    merges = []
    for token, id_ in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[id_], left, right, (token[:cut], token[cut:])))
    return [pair for *_, pair in sorted(merges)]


def _add_whole_tokens(tokenizer: Tokenizer, gguf: GGUFFile) -> None:
    """Control tokens, and those the file calls user defined, are matched whole in a text."""
    types = gguf.metadata.get("tokenizer.ggml.token_type", ())
    tokens = gguf.require("tokenizer.ggml.tokens")
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        whole = [token for token, type_ in zip(tokens, types) if type_ == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in whole])


def _special_tokens(gguf: GGUFFile) -> dict[str, str]:
    tokens = gguf.require("tokenizer.ggml.tokens")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id_ = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id_ is None:
            continue
        if not 0 <= id_ < len(tokens):
            raise ModelError(f"{gguf.path}: tokenizer.ggml.{key}_token_id {id_} is out of range")
        special[f"{name}_token"] = tokens[id_]
    return special


def _templates(gguf: GGUFFile) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(prefix + "."): value
        for key, value in gguf.metadata.items()
        if key.startswith(prefix + ".") and isinstance(value, str)
    }
    if isinstance(plain := gguf.metadata.get(prefix), str):
        named["default"] = plain
    return named
