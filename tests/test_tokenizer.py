"""The tokenizer gives back what it is given, streams it exactly, and survives any chat template."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

import moespan.tokenizer
from moespan.errors import RequestError, TokenizerError
from moespan.tokenizer import IncrementalDetokenizer, Tokenizer

SOURCE = Path(moespan.tokenizer.__file__).parents[1]
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# The letters of the byte alphabet for the 13 bytes that no UTF-8 text has. DeepSeek's vocabulary
# lacks them, and its added tokens have them, as text.
IMPOSSIBLE_BYTES = "ÀÁõö÷øùúûüýþÿ"

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": BOS, "lstrip": False, "special": True},
    "eos_token": {"__type": "AddedToken", "content": EOS, "lstrip": False, "special": True},
    "pad_token": {"__type": "AddedToken", "content": EOS, "lstrip": False, "special": True},
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizerFast",
    "chat_template": CHAT_TEMPLATE,
}
USER = [{"role": "user", "content": "hi"}]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and  then some more of the same.\n",
    "def main(argv):\n    return [int(word) for word in argv]\n",
    "混合专家模型让每个词元只经过少数专家。混合专家模型。",
    "Größe, naïve façade, Ångström; 👩‍👩‍👧‍👦 👍🏽 🙂🙂",
]


def byte_level(alphabet: str, **pre_tokenizer: bool) -> Backend:
    """A byte-level BPE tokenizer trained on a few lines of text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def full_alphabet() -> str:
    return "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))


def plain_backend() -> Backend:
    backend = byte_level(full_alphabet())
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return backend


def deepseek_backend() -> Backend:
    """The pipeline of DeepSeek-MoE-16B's tokenizer.json around a small vocabulary."""
    backend = byte_level("".join(set(full_alphabet()) - set(IMPOSSIBLE_BYTES)))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated")
            for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
        ]
        + [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    backend.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    backend.add_tokens([AddedToken(letter, normalized=True) for letter in IMPOSSIBLE_BYTES])
    return backend


PLAIN = plain_backend().to_str()
DEEPSEEK = deepseek_backend().to_str()


def write(folder: Path, tokenizer_json: str, config: Mapping[str, Any] | None = None) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("plain"), PLAIN))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("deepseek"), DEEPSEEK, DEEPSEEK_CONFIG))


@pytest.fixture
def chat(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """Loads the DeepSeek imitation with another chat template."""

    def with_template(source: str) -> Tokenizer:
        return load(write(tmp_path, DEEPSEEK, {**DEEPSEEK_CONFIG, "chat_template": source}))

    return with_template


def run_script(script: str) -> str:
    """Runs Python code in a fresh interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Loading ----


def test_importing_the_module_loads_neither_tokenizers_nor_jinja2() -> None:
    script = "import sys, moespan.tokenizer; print({'tokenizers', 'jinja2'} & {*sys.modules})"
    assert run_script(script) == "set()\n"


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(tmp_path) is None
    assert Tokenizer.from_pretrained(str(tmp_path)) is None


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{'a': 1}"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("special_tokens_map.json", b"\xff"),
        ("generation_config.json", b'{"eos_token_id": "2"}'),
        ("generation_config.json", b'{"eos_token_id": [1, -1]}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write(tmp_path, PLAIN, {}) / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        load(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json"):
        load(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has 1099511627776 bytes"):
        load(tmp_path)


def test_a_panic_inside_the_library_is_an_ordinary_error(tmp_path: Path) -> None:
    content = json.loads(PLAIN)
    content["model"]["continuing_subword_prefix"] = "🏳"
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        load(write(tmp_path, json.dumps(content)))


def test_leftover_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    backend = plain_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = load(write(tmp_path, backend.to_str()))
    text = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- The self-test ----


def test_the_self_test_covers_every_byte_of_utf8_and_survives_normalization() -> None:
    text = "".join(moespan.tokenizer._SELF_TEST.values())
    assert len({*text.encode()}) == 256 - len(IMPOSSIBLE_BYTES)
    assert unicodedata.normalize("NFC", text) == text


def test_a_tokenizer_saved_as_llamas_is_refused_and_told_what_it_loses(tmp_path: Path) -> None:
    """What saving this family's tokenizer under the wrong class makes of it."""
    content = json.loads(DEEPSEEK)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    retyped = json.loads(backend.to_str())
    content["pre_tokenizer"], content["decoder"] = retyped["pre_tokenizer"], retyped["decoder"]
    with pytest.raises(TokenizerError) as error:
        load(write(tmp_path, json.dumps(content), DEEPSEEK_CONFIG))
    message = str(error.value)
    for part in ("tokenizer.json loses spaces", "CJK text", "emoji", "original checkpoint"):
        assert part in message
    assert "'  two before, two  between, one after ' comes back as 'twobefore" in message


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"loses .*emoji"):
        load(write(tmp_path, byte_level("abc").to_str()))


def test_a_tokenizer_that_adds_a_space_is_refused(tmp_path: Path) -> None:
    backend = byte_level(full_alphabet(), add_prefix_space=True)
    with pytest.raises(TokenizerError, match="loses line breaks"):
        load(write(tmp_path, backend.to_str()))


def test_a_tokenizer_of_whole_words_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(TokenizerError, match="byte-level"):
        load(write(tmp_path, backend.to_str()))


# ---- Special tokens ----


def test_deepseeks_configuration_is_understood(deepseek: Tokenizer) -> None:
    backend = Backend.from_str(DEEPSEEK)
    assert deepseek.bos_token_id == backend.token_to_id(BOS)
    assert deepseek.eos_token_ids == {backend.token_to_id(EOS)}
    assert deepseek.has_chat_template


def test_without_configuration_there_are_no_special_tokens(plain: Tokenizer) -> None:
    assert plain.bos_token_id is None
    assert plain.eos_token_ids == frozenset()
    assert not plain.has_chat_template
    assert plain.encode("a") == plain.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_the_end_token_is_a_string_or_an_object(tmp_path: Path, token: object) -> None:
    tokenizer = load(write(tmp_path, PLAIN, {"eos_token": token}))
    assert tokenizer.eos_token_ids == {Backend.from_str(PLAIN).token_to_id("</s>")}


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None, "bos_token": None}])
def test_special_tokens_map_speaks_where_the_configuration_is_silent(
    tmp_path: Path, config: dict[str, object] | None
) -> None:
    write(tmp_path, PLAIN, config)
    content = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    assert tokenizer.decode([tokenizer.bos_token_id or 0], skip_special_tokens=False) == "<s>"
    assert tokenizer.eos_token_ids == {Backend.from_str(PLAIN).token_to_id("</s>")}


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, set()), (7, {7}), ([7, 8], {7, 8}), ([], set())]
)
def test_generation_config_may_list_further_end_tokens(
    tmp_path: Path, listed: object, expected: set[int]
) -> None:
    write(tmp_path, PLAIN, {"eos_token": "</s>"})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    own = Backend.from_str(PLAIN).token_to_id("</s>")
    assert load(tmp_path).eos_token_ids == {own} | expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<end>"}, "eos_token is '<end>', which tokenizer.json does not know"),
        ({"bos_token": 3}, "bos_token is 3; it must be a string"),
        ({"bos_token": {"lstrip": True}}, "bos_token is .* must be a string"),
        ({"add_bos_token": True}, "add_bos_token is true, but there is no bos_token"),
        ({"add_eos_token": "yes"}, "add_eos_token is 'yes'; it must be true or false"),
    ],
)
def test_a_contradiction_in_the_configuration_is_named(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        load(write(tmp_path, PLAIN, config))


def test_the_vocabulary_size_is_the_highest_id_and_one(tmp_path: Path, plain: Tokenizer) -> None:
    content = json.loads(PLAIN)
    assert plain.vocab_size == len(content["model"]["vocab"]) + 2
    content["model"]["vocab"]["ĠĠĠĠĠĠĠ"] = 5000
    assert load(write(tmp_path, json.dumps(content))).vocab_size == 5001


# ---- Encoding and decoding ----


def test_the_begin_token_comes_first_and_only_once(deepseek: Tokenizer) -> None:
    bos = deepseek.bos_token_id
    bare = deepseek.encode("hello", add_special_tokens=False)
    assert bos not in bare
    assert deepseek.encode("hello") == [bos, *bare]
    assert deepseek.encode(BOS + "hello") == [bos, *bare]
    assert deepseek.encode("") == [bos]


def test_the_end_token_comes_last_if_asked(tmp_path: Path) -> None:
    config = {**DEEPSEEK_CONFIG, "add_eos_token": True}
    tokenizer = load(write(tmp_path, DEEPSEEK, config))
    (eos,) = tokenizer.eos_token_ids
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *bare, eos]
    assert tokenizer.encode("hello" + EOS) == [tokenizer.bos_token_id, *bare, eos]


@pytest.mark.parametrize(("asked", "added"), [(None, True), (True, True), (False, False)])
def test_tokenizer_json_decides_what_the_configuration_leaves_open(
    tmp_path: Path, asked: bool | None, added: bool
) -> None:
    backend = plain_backend()
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    config = {"bos_token": "<s>", "add_bos_token": asked}
    tokenizer = load(write(tmp_path, backend.to_str(), config))
    bare = tokenizer.encode("a", add_special_tokens=False)
    assert bare[0] != bos
    assert tokenizer.encode("a") == ([bos] if added else []) + bare
    assert tokenizer.encode("<s>a") == [bos, *bare]


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(deepseek: Tokenizer) -> None:
    ids = deepseek.encode(f"one{EOS}two")
    assert deepseek.decode(ids) == "onetwo"
    assert deepseek.decode(ids, skip_special_tokens=False) == f"{BOS}one{EOS}two"


def test_letters_that_are_added_tokens_come_back(deepseek: Tokenizer) -> None:
    """The library's own decoder turns them into replacement characters."""
    text = "Führer, schön, Zürich, bạn ú, " + IMPOSSIBLE_BYTES
    ids = deepseek.encode(text, add_special_tokens=False)
    assert deepseek.decode(ids) == text
    assert "\N{REPLACEMENT CHARACTER}" in Backend.from_str(DEEPSEEK).decode(ids)


def test_an_id_without_a_token_has_no_text(plain: Tokenizer) -> None:
    ids = plain.encode("abc")
    assert plain.decode([plain.vocab_size, *ids, 1 << 40, -1]) == "abc"


def test_ids_may_be_any_kind_of_integer(plain: Tokenizer) -> None:
    ids = plain.encode("混合 experts")
    assert plain.decode(np.array(ids)) == "混合 experts"  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        plain.decode([1.0])  # type: ignore[list-item]


def test_half_a_surrogate_pair_is_refused_and_located(plain: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"'\\ud83d' at character 2"):
        plain.encode("ab\ud83d")


def test_the_text_of_one_token(deepseek: Tokenizer) -> None:
    assert deepseek.token_text(deepseek.bos_token_id or 0) == BOS
    assert deepseek.token_text(1 << 40) == "token_id:1099511627776"
    assert deepseek.token_text(-1) == "token_id:-1"
    texts = [deepseek.token_text(id_) for id_ in deepseek.encode("ü the 𐍈", False)]
    assert "".join(text for text in texts if not text.startswith("bytes:")) == "ü the "
    assert [text for text in texts if text.startswith("bytes:")] == [
        f"bytes:\\x{byte:02x}" for byte in "𐍈".encode()
    ]
    for id_ in range(deepseek.vocab_size):
        assert "\N{REPLACEMENT CHARACTER}" not in deepseek.token_text(id_)


any_text = st.text(max_size=60) | st.lists(st.sampled_from(CORPUS), max_size=2).map("".join)
many_examples = settings(max_examples=100, deadline=None)


@many_examples
@given(text=any_text)
def test_any_text_comes_back(plain: Tokenizer, deepseek: Tokenizer, text: str) -> None:
    for tokenizer in (plain, deepseek):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@many_examples
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_any_ids_decode_as_the_library_decodes_them(
    plain: Tokenizer, data: st.DataObject, skip_special_tokens: bool
) -> None:
    ids = data.draw(ids_of(plain))
    assert plain.decode(ids, skip_special_tokens) == LIBRARY.decode(ids, skip_special_tokens)


LIBRARY = Backend.from_str(PLAIN)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Sequences of ids, among them many of the single bytes that characters are cut into."""
    vocab_size = tokenizer.vocab_size
    single_bytes = [
        id_ for id_ in range(vocab_size) if len(tokenizer.decode_bytes([id_], False)) == 1
    ]
    return st.lists(st.integers(0, vocab_size - 1) | st.sampled_from(single_bytes), max_size=40)


# ---- Streaming ----


def pieces_of(
    detokenizer: IncrementalDetokenizer, ids: list[int], cuts: random.Random
) -> list[str]:
    """What the pushes return when `ids` come in runs of random length, and then finish."""
    pieces = []
    while ids:
        length = cuts.randint(0, 3)
        pieces.append(detokenizer.push(ids[:length]))
        ids = ids[length:]
    return [*pieces, detokenizer.finish()]


@many_examples
@given(data=st.data(), skip_special_tokens=st.booleans(), cuts=st.randoms(use_true_random=False))
def test_the_pieces_of_any_ids_join_to_their_text(
    plain: Tokenizer,
    deepseek: Tokenizer,
    data: st.DataObject,
    skip_special_tokens: bool,
    cuts: random.Random,
) -> None:
    for tokenizer in (plain, deepseek):
        ids = data.draw(ids_of(tokenizer))
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
        pieces = pieces_of(detokenizer, ids, cuts)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens)
        assert detokenizer.text == "".join(pieces)


@many_examples
@given(text=any_text)
def test_text_streams_without_half_characters_and_without_delay(
    deepseek: Tokenizer, text: str
) -> None:
    detokenizer = IncrementalDetokenizer(deepseek, skip_special_tokens=False)
    ids = deepseek.encode(text, add_special_tokens=False)
    sent = b""
    for id_ in ids:
        sent += deepseek.decode_bytes([id_], False)
        detokenizer.push([id_])
        # Always the longest whole text that has been sent: nothing more, nothing less.
        assert detokenizer.text == sent.decode(errors="ignore")
    assert detokenizer.finish() == ""
    assert detokenizer.text == text


@many_examples
@given(text=any_text, data=st.data())
def test_the_text_goes_on_where_the_prompt_ends(
    deepseek: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = deepseek.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(deepseek, False, prompt_token_ids=ids[:cut])
    detokenizer.push(ids[cut:])
    detokenizer.finish()
    prompt = deepseek.decode_bytes(ids[:cut], False).decode(errors="ignore")
    assert prompt + detokenizer.text == BOS + text


def test_bytes_that_are_no_character_are_shown_as_soon_as_that_is_clear(plain: Tokenizer) -> None:
    id_of_byte = {plain.decode_bytes([id_]): id_ for id_ in range(plain.vocab_size)}
    detokenizer = IncrementalDetokenizer(plain)
    assert detokenizer.push([id_of_byte[b"\xf0"]]) == ""
    assert detokenizer.push([id_of_byte[b"\x9f"]]) == ""
    assert detokenizer.push([id_of_byte[b"a"]]) == "\N{REPLACEMENT CHARACTER}a"
    assert detokenizer.push([id_of_byte[b"\xe6"]]) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.finish() == ""
    assert detokenizer.text == "\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}"


# ---- Chat ----


def test_deepseeks_chat_template_renders_as_it_should(deepseek: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好 <b>&amp;</b>"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who\nare you?"},
    ]
    prompt = deepseek.apply_chat_template(messages)
    assert prompt == (
        f"{BOS}Be brief.\n\nUser: 你好 <b>&amp;</b>\n\nAssistant: Hello!{EOS}"
        "User: Who\nare you?\n\nAssistant:"
    )
    closed = deepseek.apply_chat_template(messages, add_generation_prompt=False)
    assert closed == prompt.removesuffix("Assistant:")
    ids = deepseek.encode(prompt, add_special_tokens=False)
    assert ids.count(deepseek.bos_token_id or 0) == 1
    assert ids == deepseek.encode(prompt)


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, DEEPSEEK, DEEPSEEK_CONFIG)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load(tmp_path).apply_chat_template(USER) == "from the file"


def test_of_several_templates_the_default_one_is_meant(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = load(write(tmp_path, PLAIN, {"chat_template": templates}))
    assert tokenizer.apply_chat_template(USER) == "yes"


@pytest.mark.parametrize("value", [3, {"default": "x"}, [], [{"name": "rag", "template": "x"}]])
def test_a_malformed_chat_template_entry_is_an_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        load(write(tmp_path, PLAIN, {"chat_template": value}))


def test_without_a_template_the_way_out_is_named(plain: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"no chat template; put one .*chat_template\.jinja"):
        plain.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{%- for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{{ {'a': '混<', 'b': [1]} | tojson }}", '{"a": "混<", "b": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ pad_token }}{{ unk_token }}{{ nothing }}", EOS),
        ("{{ messages[0].role }}{{ messages|length }}{{ messages[0].name }}", "user1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "1"),
        ("{{ 'a b'|wordwrap(1) }}{{ [1]|pprint }}{{ '<'|e }}", "a\nb[1]&lt;"),
    ],
)
def test_templates_find_what_they_are_written_for(
    chat: Callable[[str], Tokenizer], source: str, expected: str
) -> None:
    assert chat(source).apply_chat_template(USER) == expected


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ("hi", "messages is str"),
        ({"role": "user", "content": "hi"}, "messages is dict"),
        (iter(USER), "messages is list_iterator"),
        ([*USER, "hi"], r"messages\[1\] is str"),
        ([*USER, {"role": "user"}], r"messages\[1\] has no 'content'"),
        ([{"content": "hi"}], r"messages\[0\] has no 'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] is NoneType"),
        ([{"role": 1, "content": "hi"}], r"messages\[0\]\['role'\] is int"),
        ([{"role": "user", "content": "hi", "name": 5}], r"messages\[0\]\['name'\] is int"),
        ([{"role": "user", "content": "a\udc00"}], r"messages\[0\]\['content'\] has '\\udc00'"),
        ([{"role": "user", "content": "x" * (2 << 20)}], "at most 2097152 can be rendered"),
    ],
)
def test_malformed_messages_are_named(deepseek: Tokenizer, messages: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        deepseek.apply_chat_template(messages)


def test_a_template_may_refuse_the_messages(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ raise_exception('roles must alternate') }}")
    for _ in range(2):
        with pytest.raises(RequestError, match="refuses the messages: roles must alternate"):
            tokenizer.apply_chat_template(USER)


def test_the_largest_conversations_fit_the_limits(deepseek: Tokenizer) -> None:
    wide = [{"role": "user", "content": "🙂" * 520_000}]
    assert len(deepseek.apply_chat_template(wide)) > 520_000
    many = [{"role": "user", "content": ""}] * 60_000
    assert deepseek.apply_chat_template(many).count("User: ") == 60_000


def test_rendering_takes_less_than_five_milliseconds(deepseek: Tokenizer) -> None:
    deepseek.apply_chat_template(USER)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        deepseek.apply_chat_template(USER * 10)
        times.append(time.perf_counter() - start)
    assert sorted(times)[15] < 0.005


# ---- Hostile templates ----

REFUSED = {
    "one huge string": "{{ 'a' * 10**9 }}",
    "a string built at compile time": "{{ 'a'|center(10**9) }}",
    "a huge list": "{{ [1] * 10**9 }}",
    "a huge range": "{{ range(10**9)|list }}",
    "a huge number": "{% set x = 10**10**6 %}{{ x ** 1000 }}",
    "doubling by concatenation": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "doubling by addition": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
    "a huge join": "{{ (range(100000)|list * 1000)|join('aaaaaaaa') }}",
    "a wide old format": "{{ '%1000000000d' % 1 }}",
    "a wide format filter": "{{ '%1000000000d'|format(1) }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a wide method": "{{ 'a'.zfill(10**9) }}",
    "a deep indent": "{{ ('a\n' * 10000)|indent(100000) }}",
    "a growing replacement": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "a deep JSON indent": "{{ [1]|tojson(indent=10**9) }}",
    "a filled batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "a gigabyte of output": (
        "{% for i in range(100000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}"
    ),
    "a gigabyte of reason": "{{ raise_exception('a' * 10**9) }}",
    "an endless macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "a class alone": "{{ ''.__class__ }}",
    "a class by subscript": "{{ ''['__class__'] }}",
    "a class by filter": "{{ ''|attr('__class__') }}",
    "a class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "a class by format": "{{ '{0.__class__}'.format(1) }}",
    "a class by late format": "{{ '{0.__class__}'|attr('format')(1) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "changed messages": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "bad syntax": "{% for %}",
    "something undefined": "{{ nothing.at.all }}",
}
SLOW = {
    "silent loops": (
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    ),
    "exponential macros": (
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a list within itself": (
        "{% set ns = namespace(x=[]) %}{% for i in range(40) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x[:] }}{{ ns.x|string|length }}"
    ),
    "a key that is slow to hash": (
        "{% set ns = namespace(x=()) %}{% for i in range(40) %}"
        "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1}|length }}"
    ),
}


SECONDS = 4  # 1.5 for the template; the rest is for starting its process on a busy machine


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_hostile_templates_are_refused(chat: Callable[[str], Tokenizer], source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"chat template of .* cannot be used"):
        chat(source).apply_chat_template(USER)
    assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW)
def test_slow_templates_are_stopped(
    chat: Callable[[str], Tokenizer], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moespan.tokenizer, "_RENDER_SECONDS", 0.2)
    with pytest.raises(TokenizerError, match=r"takes longer than 0\.2 s"):
        chat(source).apply_chat_template(USER)


def test_a_prompt_that_memory_could_hold_but_no_model_is_refused(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{% for i in range(5) %}{{ 'x' * 2**20 }}{% endfor %}")
    with pytest.raises(TokenizerError, match="it writes over 4194304 characters"):
        tokenizer.apply_chat_template(USER)


def test_hostile_templates_cost_some_seconds_and_some_tens_of_megabytes_at_most(
    tmp_path: Path,
) -> None:
    """Measured from outside, with the limits as they are and nothing else in the process."""
    hostile = [REFUSED["one huge string"], REFUSED["doubling by addition"]]
    hostile += [REFUSED["a gigabyte of output"], SLOW["silent loops"]]
    write(tmp_path, DEEPSEEK)
    output = run_script(
        f"""
        import resource, time
        from pathlib import Path
        from moespan.tokenizer import Tokenizer, TokenizerError
        Tokenizer.from_pretrained({str(tmp_path)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for source in {hostile!r}:
            Path({str(tmp_path / "chat_template.jinja")!r}).write_text(source)
            tokenizer = Tokenizer.from_pretrained({str(tmp_path)!r})
            start = time.perf_counter()
            try:
                tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])
            except TokenizerError:
                print(time.perf_counter() - start, end=" ")
            del tokenizer
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, end=" ")
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        """
    )
    *seconds, grown_kib, child_kib = map(float, output.split())
    assert len(seconds) == len(hostile)
    assert max(seconds) < SECONDS
    assert grown_kib < 8 << 10
    assert child_kib < 128 << 10


def test_after_a_broken_limit_the_next_conversation_is_served(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{{ messages[0].content * (10**9 if messages|length > 1 else 1) }}")
    for _ in range(2):
        with pytest.raises(TokenizerError, match="it needs over 64 MiB"):
            tokenizer.apply_chat_template(USER * 2)
        assert tokenizer.apply_chat_template(USER) == "hi"


def test_a_faulty_conversation_leaves_the_renderer_in_place(
    chat: Callable[[str], Tokenizer],
) -> None:
    tokenizer = chat("{{ messages[0].content }}{{ messages[1].content }}")
    assert tokenizer.apply_chat_template(USER * 2) == "hihi"
    process = renderer_of(tokenizer)
    with pytest.raises(TokenizerError, match="UndefinedError"):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.apply_chat_template(USER * 2) == "hihi"
    assert renderer_of(tokenizer) is process


def renderer_of(tokenizer: Tokenizer) -> subprocess.Popen[bytes]:
    assert tokenizer._chat_template is not None and tokenizer._chat_template._child is not None
    return tokenizer._chat_template._child._process


# ---- The process that renders ----


def test_a_renderer_that_was_killed_is_replaced(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ messages[0].content }}")
    assert tokenizer.apply_chat_template(USER) == "hi"
    renderer_of(tokenizer).kill()
    renderer_of(tokenizer).wait()
    assert tokenizer.apply_chat_template(USER) == "hi"


def test_the_renderer_ends_with_its_tokenizer(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("x")
    tokenizer.apply_chat_template(USER)
    process = renderer_of(tokenizer)
    assert process.poll() is None
    del tokenizer
    gc.collect()
    assert process.poll() is not None


def test_an_interrupted_rendering_does_not_answer_the_next_one(
    chat: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat("{{ messages[0].content }}")
    tokenizer.apply_chat_template(USER)
    pipe = renderer_of(tokenizer).stdout
    assert pipe is not None
    close_pipe = pipe.close

    class Interrupted:
        close = staticmethod(close_pipe)

        def readline(self, _: int) -> bytes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer_of(tokenizer), "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            tokenizer.apply_chat_template(USER)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "next"}]) == "next"


def test_threads_may_share_a_tokenizer(chat: Callable[[str], Tokenizer]) -> None:
    tokenizer = chat("{{ messages[0].content }}")

    def render(index: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        content = f"conversation {index}"
        return tokenizer.apply_chat_template([{"role": "user", "content": content}]) == content

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))


def test_a_forked_process_renders_by_itself_and_leaves_its_parents_renderer_alone(
    tmp_path: Path,
) -> None:
    write(tmp_path, DEEPSEEK, DEEPSEEK_CONFIG)
    output = run_script(
        f"""
        import os, sys
        from moespan.tokenizer import Tokenizer
        tokenizer = Tokenizer.from_pretrained({str(tmp_path)!r})
        def render(text):
            return tokenizer.apply_chat_template([{{"role": "user", "content": text}}])
        render("warm")
        process = tokenizer._chat_template._child._process
        child = os.fork()
        name = "parent" if child else "child"
        right = all(f"User: {{name}} {{i}}" in render(f"{{name}} {{i}}") for i in range(20))
        shared = tokenizer._chat_template._child._process is process
        if child == 0:
            del tokenizer
            sys.exit(0 if right and not shared else 1)
        status = os.waitpid(child, 0)[1]
        print(right, shared, status, process.poll())
        """
    )
    assert output == "True True 0 None\n"


def test_the_renderer_sees_no_environment_and_opens_no_files(
    chat: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "key")
    tokenizer = chat("x")
    tokenizer.apply_chat_template(USER)
    process = Path(f"/proc/{renderer_of(tokenizer).pid}")
    assert b"SECRET" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text().splitlines()
    (open_files,) = [line for line in limits if line.startswith("Max open files")]
    assert open_files.split()[3:5] == ["0", "0"]
