"""The tokenizer of the model `simulated`: a token is a byte, the most frequent first."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from crossdock.model.token_bytes import byte_alphabet
from crossdock.model.tokenizer_parts import TokenizerParts

END = "<|end|>"  # token 0
FIRST = b" etaoinshrdlcumwfgypbvkjxqz.,-?"  # tokens 1 to 31
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer() -> TokenizerParts:
    """END and the 256 bytes."""
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    pieces = [END, *(spelling[byte] for byte in dict.fromkeys([*FIRST, *range(256)]))]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return TokenizerParts(tokenizer, {"default": TEMPLATE}, {"eos_token": END})
