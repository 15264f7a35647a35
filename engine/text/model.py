"""Text to token ids and back, for one model: tokenizer, chat template, the ids that end a text.

Imports no torch: gateways use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from crossdock.engine.text.byte_level import token_bytes
from crossdock.engine.text.chat import ChatTemplate
from crossdock.engine.text.gguf_tokenizer import tokenizer_from_gguf
from crossdock.engine.weights.config import load_config
from crossdock.engine.weights.gguf_file import open_gguf
from crossdock.engine.weights.store import ModelFiles
from crossdock.proto.errors import InvalidRequest, ModelError


@dataclass(frozen=True)
class TextModel:
    """`vocab_size` is of the model's logits, which may be padded beyond the tokenizer's ids."""

    tokenizer: tokenizers.Tokenizer
    chat_template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    bos_token_id: int | None  # put before raw text; chat templates bring their own
    special_ids: frozenset[int]
    vocab_size: int
    context_length: int

    def encode(self, text: str) -> list[int]:
        """Raw text as a prompt, begun as the model was trained to have it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=True).ids
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Raises InvalidRequest where the model has no template or the template refuses."""
        if self.chat_template is None:
            raise InvalidRequest("messages", len(messages), "this model has no chat template")
        text = self.chat_template.render(messages, add_generation_prompt, tools)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character show as U+FFFD."""
        if self.byte_level:
            return token_bytes(self.token(token_id)).decode("utf-8", "replace")
        return self.decode([token_id], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's entry; empty for ids that pad the vocabulary."""
        return self._tokens.get(token_id, "")

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens spell bytes, so that they can be decoded one by one."""
        return isinstance(self.tokenizer.decoder, tokenizers.decoders.ByteLevel)

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {number: token for token, number in self.tokenizer.get_vocab().items()}


def load_text(files: ModelFiles) -> TextModel:
    """Raises ModelError naming the file and what is missing or wrong in it."""
    config = load_config(files)
    tokenizer, template, bos = _from_gguf(files) if files.format == "gguf" else _from_hf(files.path)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ModelError(
            f"{files.path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, "
            f"the model {config.vocab_size}"
        )
    added = tokenizer.get_added_tokens_decoder().items()
    return TextModel(
        tokenizer=tokenizer,
        chat_template=template,
        eos_token_ids=frozenset(config.eos_token_ids),
        bos_token_id=bos,
        special_ids=frozenset(number for number, token in added if token.special),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )


_Parts = tuple[tokenizers.Tokenizer, ChatTemplate | None, int | None]


def _from_gguf(files: ModelFiles) -> _Parts:
    gguf = open_gguf(files.path)
    meta, tokenizer = gguf.metadata, tokenizer_from_gguf(gguf)
    source = meta.get("tokenizer.chat_template")
    specials = {
        f"{name}_token": gguf.require("tokenizer.ggml.tokens")[meta[key]]
        for name in ("bos", "eos")
        if (key := f"tokenizer.ggml.{name}_token_id") in meta
    }
    bos = meta.get("tokenizer.ggml.bos_token_id")
    starts = meta.get("tokenizer.ggml.add_bos_token", False)
    return tokenizer, ChatTemplate(source, specials) if source else None, bos if starts else None


def _from_hf(folder: Path) -> _Parts:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: missing")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    settings = _json(folder / "tokenizer_config.json")
    specials = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token")}
    source = _hf_template(folder, settings)
    bos = tokenizer.token_to_id(specials["bos_token"]) if settings.get("add_bos_token") else None
    return tokenizer, ChatTemplate(source, specials) if source else None, bos


def _hf_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path}: not a JSON object")
    return contents


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")
