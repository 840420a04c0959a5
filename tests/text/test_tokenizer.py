"""The tokenizer returns the text that it is given, and streams it exactly."""

from __future__ import annotations

import json
import random
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import (
    decoders,
    models,
    pre_tokenizers,
    processors,
)

import moespan.text.tokenizer
from moespan.errors import RequestError, TokenizerError
from moespan.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.text.tokenizer_files import (
    BOS,
    CORPUS,
    DEEPSEEK,
    DEEPSEEK_CONFIG,
    EOS,
    IMPOSSIBLE_BYTES,
    PLAIN,
    byte_level,
    full_alphabet,
    load,
    plain_backend,
    run_script,
    write,
)
from tests.tiers import examples


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("plain"), PLAIN))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("deepseek"), DEEPSEEK, DEEPSEEK_CONFIG))


# ---- Loading ----


def test_importing_the_module_loads_neither_tokenizers_nor_jinja2() -> None:
    script = "import sys, moespan.text.tokenizer; print({'tokenizers', 'jinja2'} & {*sys.modules})"
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
    with pytest.raises(
        TokenizerError, match=r"cannot read .*tokenizer\.json: it has over 67108864"
    ):
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
    text = "".join(moespan.text.tokenizer._SELF_TEST.values())
    assert len({*text.encode()}) == 256 - len(IMPOSSIBLE_BYTES)
    assert unicodedata.normalize("NFC", text) == text


def test_a_tokenizer_saved_as_llamas_is_refused_with_its_losses_named(tmp_path: Path) -> None:
    """The file that results from saving this family's tokenizer under the wrong class."""
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
def test_special_tokens_map_fills_gaps_of_the_configuration(
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


def test_the_vocabulary_size_is_the_highest_id_plus_one(tmp_path: Path, plain: Tokenizer) -> None:
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
many_examples = settings(max_examples=examples(100), deadline=None)


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
    """The results of `push` for runs of `ids` of random length, and of `finish`."""
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
        # Always the longest complete text that has been sent.
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


def test_a_long_text_is_encoded_as_a_short_one_is(
    deepseek: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["森林 🙂 one two " * 400, "a\ud7ff\n" * 3000, " " * 5000]
    long = [deepseek.encode(text) for text in texts]
    monkeypatch.setattr(moespan.text.tokenizer, "_LONG_CHARACTERS", 1 << 30)
    assert [deepseek.encode(text) for text in texts] == long


def test_other_threads_run_while_a_long_text_is_encoded(plain: Tokenizer) -> None:
    text = "one two " * 60_000
    began, is_done = threading.Event(), threading.Event()

    def encode() -> None:
        began.set()
        plain.encode(text)
        is_done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    began.wait()
    num_turns = 0
    while not is_done.is_set():
        time.sleep(0.001)
        num_turns += 1
    thread.join()
    assert num_turns > 10  # with the lock held all the while there are one or two
