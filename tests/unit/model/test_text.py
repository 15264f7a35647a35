"""Text: tokenizers from GGUF and from folders, chat templates, the incremental detokenizer."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from crossdock.model.chat_template import ChatTemplate
from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.gguf_tokenizer import read_gguf_tokenizer
from crossdock.model.hf_tokenizer import read_hf_tokenizer
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.model.token_bytes import TokenBytes, byte_alphabet
from crossdock.proto.errors import InvalidRequest, ModelError

TEXTS = [
    "",
    " ",
    "a",
    "The capital of France is Paris.",
    "  leading, trailing  and   inner    spaces   ",
    "tabs\tand\r\nline\n\n\nbreaks\n",
    "I'll don't we've IT'S they're",
    "3.14159 and 1,000,000 in 2026-11-21 x86_64 v2.0",
    "Grüße aus Köln, žluťoučký kůň, naïve café, İstanbul",
    "你好，世界。こんにちは世界。안녕하세요 세계",
    "привет мир שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "🙂🚚📦 👩‍👩‍👧‍👦 🇫🇷 ✈️ e\u0301 \u00e9",
    "def add(a, b):\n    return a + b\n\n\nprint(add(x, y))  # comment\n",
    '{"key": [true, null, "val\\n"], "nested": {"a": -1e9}}',
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <repo_name>c",
    "half <|im_sta and <|im_end",
    "\u0000\u0001\u007f\u00a0\u2003\ufeff\u200b",
    "x" * 300,
]


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> TextModel:
    return load_text(resolve(str(tiny_model)))


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> TextModel:
    return load_text(resolve(str(smollm2)))


@pytest.fixture(scope="module")
def smol_reference(smollm2: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module")
def tiny_reference(tiny_model: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


# -- against transformers --------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_gguf_ids_equal_transformers(smol, smol_reference, text):
    ids = smol.encode(text)
    assert ids == smol_reference(text).input_ids
    assert smol.decode(ids, skip_special_tokens=False) == text


def test_smollm_numbers_are_split_off_before_spaces(smol):
    """As the model was trained: the run of spaces before a digit is one piece. (A tokenizer that
    ignores tokenizer.ggml.pre leaves the last space to the digit.)"""
    for text, pieces in {
        "  1": ["  ", "1"],
        "a:\n\n12": ["a", ":", "\n\n", "1", "2"],
        "x = 42": ["x", " =", " ", "4", "2"],
        "a ½": ["a", " ", "½"],
    }.items():
        assert [smol.token_text(id_) for id_ in smol.encode(text)] == pieces


def test_gguf_chat_template_equals_transformers(smol, smol_reference):
    conversation = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris.\n"},
        {"role": "user", "content": "And of Italy? 🙂"},
    ]
    for messages in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        for prompt in (True, False):
            expected = smol_reference.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert smol.template.render(messages, prompt) == expected
            assert smol.decode(smol.apply_chat_template(messages, prompt), False) == expected


def test_gguf_facts_and_time(smol, smollm2):
    assert smol.eos_token_ids == {2}
    assert (smol.vocab_size, smol.context_length) == (49_152, 8_192)
    load_text.cache_clear()
    start = time.process_time()
    load_text(resolve(str(smollm2)))
    assert time.process_time() - start < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_folder_ids_equal_transformers(tiny, tiny_reference, text):
    ids = tiny.encode(text)
    assert ids == tiny_reference(text).input_ids
    assert tiny.decode(ids) == tiny_reference.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_folder_chat_equals_transformers(tiny, tiny_reference):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for prompt in (True, False):
        expected = tiny_reference.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )
        assert tiny.apply_chat_template(messages, prompt) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_random_ids_decode_as_transformers_does(tiny, tiny_reference, seed):
    """Also where the ids make no UTF-8."""
    rng = random.Random(seed)
    ids = [rng.randrange(tiny.tokenizer.get_vocab_size()) for _ in range(400)]
    assert tiny.decode(ids) == tiny_reference.decode(ids, skip_special_tokens=True)
    assert tiny.decode(ids, skip_special_tokens=False) == tiny_reference.decode(ids)


def test_no_heavy_import():
    code = "import sys, crossdock.model.text; print([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'ray', 'nixl')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_encoding_starts_no_threads():
    code = "import os; from crossdock.model.store import ModelFiles, SIMULATED\n"
    code += "from pathlib import Path; from crossdock.model.text import load_text\n"
    code += "text = load_text(ModelFiles(SIMULATED, Path(SIMULATED), 'bytes', ''))\n"
    code += "before = len(os.listdir('/proc/self/task')); text.encode('one text at a time')\n"
    code += "print(len(os.listdir('/proc/self/task')) - before)"
    plain = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=plain) == "0\n"


# -- folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy whose tokenizer files a test may change."""
    for path in tiny_model.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


def change(path: Path, **fields) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))


def test_bos_is_added_where_the_config_says_so(folder):
    bare = read_hf_tokenizer(folder).tokenizer.encode("hi").ids
    change(folder / "tokenizer_config.json", add_bos_token=True)
    assert read_hf_tokenizer(folder).tokenizer.encode("hi").ids == [0, *bare]
    change(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    assert read_hf_tokenizer(folder).tokenizer.encode("hi").ids == [*bare, 2]
    change(folder / "tokenizer_config.json", add_bos_token=True, bos_token="<none>")
    with pytest.raises(ModelError, match="'<none>' is not in the vocabulary"):
        read_hf_tokenizer(folder)


def test_special_tokens_are_found_as_text_and_as_objects(folder):
    change(folder / "tokenizer_config.json", bos_token={"content": "<|im_start|>"}, eos_token=None)
    change(folder / "special_tokens_map.json", eos_token="<|endoftext|>", bos_token="x")
    special = read_hf_tokenizer(folder).special
    assert special["bos_token"] == "<|im_start|>" and special["eos_token"] == "<|endoftext|>"


def test_templates_as_text_list_and_file(folder):
    config = folder / "tokenizer_config.json"
    assert set(read_hf_tokenizer(folder).template) == {"default"}
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    change(config, chat_template=named)
    template = ChatTemplate(read_hf_tokenizer(folder).template, {}, "here")
    assert template.render([], True) == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert read_hf_tokenizer(folder).template["default"] == "J"
    change(config, chat_template=7)
    with pytest.raises(ModelError, match="neither text nor a list"):
        read_hf_tokenizer(folder)
    change(config, chat_template=[{"name": "x"}])
    with pytest.raises(ModelError, match="'template'"):
        read_hf_tokenizer(folder)


def test_damaged_folders_are_named(folder):
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:100])
    with pytest.raises(ModelError, match="not a tokenizer"):
        read_hf_tokenizer(folder)
    tokenizer.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        read_hf_tokenizer(folder)


def test_damaged_tokenizer_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not JSON"):
        read_hf_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds list"):
        read_hf_tokenizer(folder)


def test_a_decoder_that_is_not_known_is_refused():
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"here: the tokenizer's decoder \(WordPiece\)"):
        TokenBytes(tokenizer, "here")


def test_ids_beyond_the_tokenizer_have_no_text(tiny):
    beyond = tiny.tokenizer.get_vocab_size() + 5
    assert tiny.decode([beyond]) == "" and tiny.token_text(beyond) == ""


def test_byte_alphabet_is_the_libraries_own():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"]) == (0x20, 0x0A, 0x61)


# -- GGUF ------------------------------------------------------------------------------------


def write_gguf(path: Path, tokens: list[str], types: list[int], **values) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values.pop("model", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in values.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["\u2581", "h", "i", "t", "e", "hi", "\u2581h", "\u2581hi", "th", "\u2581the", "\u2581th"]


def sentencepiece(path: Path, **values) -> Path:
    tokens = PIECES + WORDS
    types = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    scores = [0.0] * len(PIECES) + [-10.0] * 5 + [-1.0, -3.0, -2.0, -1.5, -4.0, -5.0]
    defaults = {"add_token_scores": scores, "add_bos_token_id": 1, "add_eos_token_id": 2}
    return write_gguf(path, tokens, types, **(defaults | values))


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_sentencepiece_gguf(tmp_path):
    parts = read_gguf_tokenizer(sentencepiece(tmp_path / "spm.gguf"))
    tokenizer = parts.tokenizer
    assert pieces_of(tokenizer, "hi the") == ["<s>", "\u2581hi", "\u2581the"]
    assert pieces_of(tokenizer, "hé")[1:] == ["\u2581h", "<0xC3>", "<0xA9>"]
    assert pieces_of(tokenizer, "</s>hi")[1] == "</s>"
    assert parts.special == {"bos_token": "<s>", "eos_token": "</s>"} | {
        k: v for k, v in parts.special.items() if k in ("unk_token", "pad_token")
    }
    pieces = TokenBytes(tokenizer, "here")
    assert pieces.strips_first_space
    text = TextModel(tokenizer, pieces, None, frozenset({2}), 270, 100)
    for words in ("hi the", "hé\nthe 🙂", " hi"):
        assert text.decode(text.encode(words)) == words
    prompt, answer = text.encode("hi"), text.encode("the")[1:]
    continued = IncrementalDetokenizer(text, prompt)
    assert continued.push(answer).text + continued.finish() == " the"
    first = IncrementalDetokenizer(text, [])
    assert first.push(answer).text + first.finish() == "the"


@pytest.mark.parametrize(("text", "begin"), [
    ("hi the", ["", "hi", " the"]), ("</s>hi é", ["", "</s>", "hi", " ", "é", "é"]),
])  # fmt: skip
def test_tokens_begin_where_their_text_does_in_what_was_sent(
    tmp_path: Path, text: str, begin: list[str]
) -> None:
    """Though a space was put before it, or what is spelled like a special token was read as one."""
    tokenizer = read_gguf_tokenizer(sentencepiece(tmp_path / "spm.gguf")).tokenizer
    found = TextModel(tokenizer, TokenBytes(tokenizer, ""), None, frozenset(), 270, 100)
    starts = found.starts(text, found.encode(text))
    assert len(starts) == len(begin)
    assert all(text.startswith(each, at) for each, at in zip(begin, starts)), starts
    assert starts == sorted(starts)
    assert found.starts(text, [7, 7, 7]) == []


def test_tokens_of_a_text_that_is_normalized(tiny_model: Path) -> None:
    told = json.loads((tiny_model / "tokenizer.json").read_text())
    told["normalizer"] = {"type": "NFC"}
    told["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                              "use_regex": True}  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(told))
    found = TextModel(tokenizer, TokenBytes(tokenizer, ""), None, frozenset(), 384, 100)
    text = "e\u0301e\u0301 Paris"
    ids = found.encode(text)
    assert found.decode(ids) == "éé Paris"
    pieces = [found.token_bytes(token_id) for token_id in ids]
    composed = [len(b"".join(pieces[:at]).decode("utf-8", "ignore")) for at in range(len(ids))]
    assert found.starts(text, ids) == [at + min(at, 2) for at in composed]


def test_sentencepiece_gguf_without_bos_and_prefix_space(tmp_path):
    path = sentencepiece(tmp_path / "spm.gguf", add_add_bos_token=False, add_add_space_prefix=False)
    tokenizer = read_gguf_tokenizer(path).tokenizer
    assert pieces_of(tokenizer, "hi the") == ["hi", "\u2581the"]
    assert not TokenBytes(tokenizer, "here").strips_first_space


def test_gguf_tokenizers_that_are_not_supported_are_named(tmp_path):
    with pytest.raises(ModelError, match="'bert' is not supported"):
        read_gguf_tokenizer(sentencepiece(tmp_path / "a.gguf", model="bert"))
    byte_level = {"model": "gpt2", "add_token_merges": ["h i"]}
    with pytest.raises(ModelError, match="'klingon' is not supported"):
        path = sentencepiece(tmp_path / "b.gguf", add_tokenizer_pre="klingon", **byte_level)
        read_gguf_tokenizer(path)
    with pytest.raises(ModelError, match="bos_token_id 5000 is out of range"):
        read_gguf_tokenizer(sentencepiece(tmp_path / "c.gguf", add_bos_token_id=5000))
    with pytest.raises(ModelError, match="not a usable tokenizer"):
        broken = {"model": "gpt2", "add_token_merges": ["no such"]}
        read_gguf_tokenizer(sentencepiece(tmp_path / "d.gguf", **broken))


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-2", "smollm"])
def test_named_splits(tmp_path, name):
    """What each split does with words, numbers and line breaks, told by byte-level pieces."""
    alphabet = [*byte_alphabet(), "hi"]
    path = write_gguf(
        tmp_path / "x.gguf",
        alphabet,
        [1] * 257,
        model="gpt2",
        add_token_merges=["h i"],
        add_tokenizer_pre=name,
    )
    tokenizer = read_gguf_tokenizer(path).tokenizer
    split = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("aB 12345!\n\nx")]
    assert (
        split
        == {
            "llama-bpe": ["aB", "Ġ", "123", "45", "!ĊĊ", "x"],
            "qwen2": ["aB", "Ġ", "1", "2", "3", "4", "5", "!ĊĊ", "x"],
            "tekken": ["a", "B", "Ġ", "1", "2", "3", "4", "5", "!ĊĊ", "x"],
            "gpt-2": ["aB", "Ġ12345", "!", "Ċ", "Ċ", "x"],
            "smollm": ["aB", "Ġ", "1", "2", "3", "4", "5", "!", "Ċ", "Ċ", "x"],
        }[name]
    )


# -- chat templates --------------------------------------------------------------------------


def render(source: str, messages=(), prompt=True, **special) -> str:
    return ChatTemplate({"default": source}, special, "here").render(messages, prompt)


def test_what_templates_may_use():
    assert render("{{ bos_token }}|{{ tools is none }}", bos_token="<s>") == "<s>|True"
    assert render("{{ {'ü': '<b>'} | tojson }}") == '{"ü": "<b>"}'
    assert (
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert render("{% generation %}said{% endgeneration %}.") == "said."
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% if add_generation_prompt %}go{% endif %}", prompt=False) == ""
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"


def test_text_parts_are_joined():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    assert render("{{ messages[0].content }}", messages) == "ab"
    messages[0]["content"].append({"type": "image_url"})
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content.*must be a text"):
        render("{{ messages[0].content }}", messages)


def test_a_developer_is_the_system_to_a_template_that_knows_none():
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "developer"}]
    roles = "{% for m in messages %}{{ m.role }} {% endfor %}"
    assert render(roles, messages) == "system user "
    knows = "{% set first = 'developer' %}" + roles
    assert render(knows, messages) == "developer user "


def test_what_a_template_refuses_is_the_requests_fault():
    messages = [{"role": "user", "content": None}]
    for source, why in {
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{{ 'a' + messages[0].content }}": "concatenate",
        "{{ messages[7].content }}": "has no element",
        "{{ messages.append(1) }}": "append",
        "{{ ''.__class__.__mro__ }}": "unsafe",
    }.items():
        with pytest.raises(InvalidRequest, match=why) as caught:
            render(source, messages)
        assert caught.value.field == "messages"


def test_broken_and_missing_templates(tiny):
    with pytest.raises(ModelError, match="here: chat template 'default'"):
        render("{% if %}")
    bare = TextModel(tiny.tokenizer, tiny.pieces, None, tiny.eos_token_ids, 384, 2048)
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "hi"}])
