"""The tokenizer of a Hugging Face model folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from crossdock.model.config import read_json
from crossdock.model.tokenizer_parts import TokenizerParts, surround
from crossdock.proto.errors import ModelError

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


def read_hf_tokenizer(folder: Path) -> TokenizerParts:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

    Raises ModelError naming the file that is missing or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder}: tokenizer.json is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named, config = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    special = _special_tokens(named | config)
    if "add_bos_token" in config or "add_eos_token" in config:
        before = special.get("bos_token") if config.get("add_bos_token") else None
        after = special.get("eos_token") if config.get("add_eos_token") else None
        for token in (before, after):
            if token is not None and tokenizer.token_to_id(token) is None:
                raise ModelError(f"{path}: special token {token!r} is not in the vocabulary")
        surround(tokenizer, before, after)
    return TokenizerParts(tokenizer, _templates(folder, config), special)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    special = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    return special


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; a chat_template.jinja file goes before tokenizer_config.json."""
    templates: dict[str, str] = {}
    path, given = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        try:
            templates = {str(item["name"]): str(item["template"]) for item in given}
        except (KeyError, TypeError) as error:
            raise ModelError(f"{path}: chat_template: an item has no {error}") from error
    elif given is not None:
        raise ModelError(f"{path}: chat_template: neither text nor a list")
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            templates["default"] = jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{jinja}: {error}") from error
    return templates
