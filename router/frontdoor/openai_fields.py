"""Fields of OpenAI's, vLLM's and others' bodies that are known here and not supported.

A field that would change the answer is refused by name unless it asks for what is done anyway. A
field that changes nothing is ignored. One that is in no table is unknown: ignored too, or refused
by name where the gateway is strict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from crossdock.proto.errors import InvalidRequest

# Field -> the values, beside null, under which the answer is as it would be without it.
CHANGE_THE_ANSWER: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "grammar": ("",),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "documents": ([],),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "mm_processor_kwargs": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "no_repeat_ngram_size": (0,),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "lora_path": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
CHANGE_A_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "prefix": (False,),
    "partial": (False,),
}
A_STREAM_IGNORES = frozenset({"include_obfuscation"})  # padding against who watches the wire
CHANGE_NOTHING = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
A_MESSAGE_IGNORES = frozenset({"name"})
A_PART_IGNORES = frozenset({"cache_control"})  # what is cached here is found without it


def check_fields(raw: Mapping[str, Any], known: Collection[str], strict: bool) -> None:
    """Raises InvalidRequest for the first field, not in `known`, that is not supported, or, where
    `strict`, in no table here."""
    for name, value in raw.items():
        as_asked = name == "best_of" and _same(value, raw.get("n"))
        if name in CHANGE_THE_ANSWER and name not in known and not as_asked:
            _check(name, value, CHANGE_THE_ANSWER[name])
    if strict:
        _check_known("", raw.keys() - known - CHANGE_THE_ANSWER.keys() - CHANGE_NOTHING)


def check_stream(raw: Mapping[str, Any], known: Collection[str], strict: bool) -> None:
    """The same for the fields of its stream_options."""
    options = raw.get("stream_options")
    if strict and isinstance(options, dict):
        _check_known("stream_options.", options.keys() - known - A_STREAM_IGNORES)


def check_messages(
    raw: Mapping[str, Any], known: Collection[str], part: Collection[str], strict: bool
) -> None:
    """The same for the fields of its messages, and of the parts that a message's content has."""
    messages = raw.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        for name, value in message.items():
            if name in CHANGE_A_MESSAGE and name not in known:
                _check(f"messages[{i}].{name}", value, CHANGE_A_MESSAGE[name])
        if strict:
            named = message.keys() - known - CHANGE_A_MESSAGE.keys() - A_MESSAGE_IGNORES
            _check_known(f"messages[{i}].", named)
            content = message.get("content")
            for j, each in enumerate(content if isinstance(content, list) else []):
                named = each.keys() - part - A_PART_IGNORES if isinstance(each, dict) else set()
                _check_known(f"messages[{i}].content[{j}].", named)


def _check(field: str, value: Any, harmless: tuple[Any, ...]) -> None:
    if value is not None and not any(_same(value, one) for one in harmless):
        raise InvalidRequest(field, value, "is not supported by this server")


def _check_known(prefix: str, unknown: Collection[str]) -> None:
    for name in sorted(unknown):
        limit = "is not known here, and gateway.http_options.strict is on"
        raise InvalidRequest(prefix + name, "given", limit)


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON has it, where true is not 1."""
    return isinstance(value, bool) is isinstance(other, bool) and value == other
