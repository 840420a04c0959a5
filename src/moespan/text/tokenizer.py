"""The tokenizer: text to token ids and back, also while the ids still arrive.

The BPE of this model family is byte-level: a token stands for a fixed run of bytes, and a text is
the UTF-8 decoding of the runs of its tokens. All of this module relies on that. The `tokenizers`
library encodes; decoding is one table look-up per token. A tokenizer that does not return the text
that it was given is refused at load.

`moespan.text.chat_template` renders chat templates; for this module their result is text.

This module knows no models and no devices. Importing it loads neither `tokenizers` nor `jinja2`.
"""

from __future__ import annotations

import codecs
import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moespan import files
from moespan.errors import RequestError, TokenizerError, shortened, shown
from moespan.text import tokenizer_file
from moespan.text.chat_template import ChatTemplate, check_unicode

if TYPE_CHECKING:
    import tokenizers

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

# tokenizer_config.json may list all added tokens; a chat template is much smaller.
_MOST_FILE_BYTES: Final = 16 << 20

# Texts up to this length are encoded in a call that is quicker to make, and holds Python's lock for
# two milliseconds at most.
_LONG_CHARACTERS: Final = 2048

# Keys in tokenizer_config.json of the tokens that a chat template may name.
_NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Texts that are encoded and decoded at load, by what a tokenizer loses that changes the text.
_SELF_TEST: Final = {
    "spaces": "  two before, two  between, one after ",
    "line breaks": "one\n\ntwo\r\n\tthree\n",
    "code": "def f(x):\n    return {'k': x[0] ** 2}  # ok?\n",
    "accented letters": "Größe, þú, cœur, naïve, Ångström",
    "CJK text": "混合专家模型，こんにちは、안녕하세요。",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳",
    # ASCII, every continuation byte, then every lead byte of two, three and four.
    "rare bytes": "".join(
        map(
            chr,
            (
                *range(0xC0),
                *range(0xE1, 0x800, 0x40),
                *(0x905, *range(0x1010, 0x10000, 0x1000)),
                *(0x10010, *range(0x40010, 0x110000, 0x40000)),
            ),
        )
    ),
}

_NOT_OF_THIS_FAMILY: Final = (
    "It is not the byte-level tokenizer of this model family; most likely it was saved anew by a "
    "library that takes it for Llama's, as transformers 5.3 to 5.21 do. Use the tokenizer.json of "
    "the original checkpoint"
)


class Tokenizer:
    """The tokenizer of one checkpoint. Threads may share it.

    Attributes:
        eos_token_ids: ids that end a generation: the id of `eos_token`, and the ids that
            generation_config.json lists. May be empty.
        bos_token_id: the id of `bos_token`; None if there is no such token.
        vocab_size: the highest id + 1, added tokens included. A model's vocabulary may be padded
            beyond that; the additional ids have no text.
        longest_token_bytes: bytes of the longest token.
        named_tokens: texts of the tokens that have a name, such as `bos_token`.
        special_token_ids: ids of special tokens, which stand for no text.
        chat_template: source of the chat template; None without one.
    """

    def __init__(
        self,
        folder: Path,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, object],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """Use `from_pretrained`.

        Args:
            folder: folder of the files, for error messages.
            backend: the tokenizer of tokenizer.json.
            settings: the content of tokenizer_config.json.
            eos_token_ids: ids that end a generation in addition to the id of `eos_token`.
            chat_template: source of the chat template.
        """
        self._folder = folder
        self._backend = backend
        added_tokens = backend.get_added_tokens_decoder()
        self._bytes_of = {id_: _token_bytes(token) for token, id_ in backend.get_vocab().items()}
        # An added token is matched in the text literally, so it must be decoded literally, although
        # its letters may be letters of the byte alphabet. DeepSeek adds "ü" and a dozen more, which
        # the decoder of `tokenizers` takes for bytes and turns into �.
        self._bytes_of.update((id_, token.content.encode()) for id_, token in added_tokens.items())
        self.vocab_size = max(self._bytes_of, default=-1) + 1
        self.longest_token_bytes = max(map(len, self._bytes_of.values()), default=1)

        self.named_tokens = dict(_named_tokens(folder, settings))
        named_ids = map(backend.token_to_id, self.named_tokens.values())
        special = {id_ for id_, token in added_tokens.items() if token.special}
        special.update(id_ for id_ in named_ids if id_ is not None)
        self.special_token_ids = frozenset(special)

        self.bos_token_id = self._id_of("bos_token")
        self._eos_token_id = self._id_of("eos_token")
        own_eos = () if self._eos_token_id is None else (self._eos_token_id,)
        self.eos_token_ids = frozenset((*own_eos, *eos_token_ids))

        # If tokenizer_config.json does not say what to add, tokenizer.json decides.
        probe = self._backend_ids("a", add_special_tokens=True)
        self._first = self._token_to_add("add_bos_token", settings, self.bos_token_id, probe[:1])
        self._last = self._token_to_add("add_eos_token", settings, self._eos_token_id, probe[-1:])

        self.chat_template = chat_template
        self._chat_template: ChatTemplate | None = None
        if chat_template is not None:
            self._chat_template = ChatTemplate(chat_template, self.named_tokens, folder)
        self._self_test()

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` has a template."""
        return self.chat_template is not None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, chat_template: str | Path | None = None
    ) -> Tokenizer | None:
        """Loads the tokenizer of the checkpoint folder `path`; None if it has no tokenizer.json.

        Args:
            chat_template: file of a chat template that takes the place of the checkpoint's own.

        Raises:
            TokenizerError: a file cannot be read, two files contradict each other, or text does
                not survive encoding and decoding.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a folder; give the folder of a checkpoint")
        file = folder / "tokenizer.json"
        if not file.exists():
            return None
        config = _read_json(folder / "tokenizer_config.json")
        return cls(
            folder,
            _read_backend(file),
            {
                **_read_json(folder / "special_tokens_map.json"),
                **{key: value for key, value in config.items() if value is not None},
            },
            _read_eos_token_ids(folder / "generation_config.json"),
            _read_chat_template(folder / "chat_template.jinja", config)
            if chat_template is None
            else _read_template_file(Path(chat_template)),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; special tokens that are written out in it become their ids.

        With `add_special_tokens`, the begin token comes first and the end token last, if the
        checkpoint's configuration asks for them and the text does not already have them.

        Raises:
            RequestError: `text` contains half a surrogate pair, which is not a character.
        """
        check_unicode(text, "text")
        ids = self._backend_ids(text, add_special_tokens=False)
        if add_special_tokens:
            if self._first is not None and ids[:1] != [self._first]:
                ids.insert(0, self._first)
            if self._last is not None and ids[-1:] != [self._last]:
                ids.append(self._last)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Invalid UTF-8 becomes �; unknown ids have no text."""
        return self.decode_bytes(token_ids, skip_special_tokens).decode("utf-8", "replace")

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """The bytes of `token_ids`, which may begin or end in the middle of a character."""
        hidden = self.special_token_ids if skip_special_tokens else ()
        return b"".join(
            [
                self._bytes_of.get(id_, b"")
                for id_ in map(operator.index, token_ids)  # items of a tensor are not dict keys
                if id_ not in hidden
            ]
        )

    def token_text(self, token_id: int) -> str:
        r"""One token, special or not, as lists of log probabilities show it. Never raises.

        A token of incomplete characters is shown as its bytes, `bytes:\xe6\xb7`, because � would
        hide which of many tokens it is. An id without a token is shown as `token_id:102399`.
        """
        data = self._bytes_of.get(token_id)
        if data is None:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the checkpoint's chat template makes of `messages`.

        The prompt already begins with the begin token if the template adds one, so encode it with
        `add_special_tokens=False`.

        Args:
            messages: each has a "role" and a "content"; the template decides what other keys mean.
            add_generation_prompt: end with the text after which the model answers.

        Raises:
            RequestError: there is no template, the messages are malformed or too long, or the
                template itself refuses them.
            TokenizerError: the template is faulty, or breaks its time or memory limit.
        """
        if self._chat_template is None:
            raise RequestError(
                f"the tokenizer of {self._folder} has no chat template; put one beside it as "
                "chat_template.jinja, or complete a plain prompt"
            )
        return self._chat_template.render(messages, add_generation_prompt)

    def _id_of(self, name: str) -> int | None:
        """The id of the token under the key `name`, e.g. "bos_token"; None without such a key."""
        token = self.named_tokens.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{self._folder}: {name} is {shown(token)}, which tokenizer.json does not know; "
                "take both files from the same checkpoint"
            )
        return token_id

    def _backend_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with _backend_errors(f"{self._folder}/tokenizer.json cannot encode {text[:40]!r}"):
            if len(text) > _LONG_CHARACTERS:  # this call leaves other threads Python's lock
                batch = self._backend.encode_batch_fast([text], add_special_tokens)
                return batch[0].ids
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _token_to_add(
        self, setting: str, settings: Mapping[str, object], token_id: int | None, probe: list[int]
    ) -> int | None:
        """`token_id` if `encode` has to add it, else None.

        Args:
            setting: the key that decides, e.g. "add_bos_token".
            probe: ids that tokenizer.json puts in this place; they decide without the key.
        """
        asked = settings.get(setting, probe == [token_id])
        if not isinstance(asked, bool):
            raise TokenizerError(
                f"{self._folder}/tokenizer_config.json: {setting} is {shown(asked)}; "
                "it must be true or false"
            )
        if asked and token_id is None:
            raise TokenizerError(
                f"{self._folder}/tokenizer_config.json: {setting} is true, but there is no "
                f"{setting.removeprefix('add_')}; name one or set it to false"
            )
        return token_id if asked else None

    def _self_test(self) -> None:
        """Refuses a tokenizer that does not return the text that it was given."""
        returned = {
            kind: self.decode(self.encode(text, add_special_tokens=False), False)
            for kind, text in _SELF_TEST.items()
        }
        lost = [kind for kind, text in _SELF_TEST.items() if returned[kind] != text]
        if lost:
            raise TokenizerError(
                f"{self._folder}/tokenizer.json loses {', '.join(lost)}: "
                f"{shown(_SELF_TEST[lost[0]])} comes back as {shown(returned[lost[0]])}. "
                f"{_NOT_OF_THIS_FAMILY}"
            )


class IncrementalDetokenizer:
    """Turns token ids into text while they arrive.

    However a sequence is cut into calls of `push`, the returned pieces and the piece of `finish`
    join to `Tokenizer.decode` of the whole sequence. At most the first three bytes of a character
    are held back, until the next token completes the character or shows that there is none.

    If the prompt ends in the middle of a character, the rest of that character begins the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        # The last three bytes decide what is pending; everything before them is complete.
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = tokenizer.decode_bytes((token_id,), skip_special_tokens) + tail
            if len(tail) >= 3:
                break
        self._decoder.decode(tail[-3:])

    @property
    def text(self) -> str:
        """All text so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that they complete."""
        return self._take(self._tokenizer.decode_bytes(token_ids, self._skip_special_tokens))

    def finish(self) -> str:
        """Ends the sequence and returns the rest of the text: � for an incomplete character."""
        return self._take(b"", final=True)

    def _take(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        self._pieces.append(text)
        return text


def _byte_alphabet() -> dict[str, int]:
    """Letter of byte-level BPE → its byte: printable bytes are themselves, others are moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_LETTER: Final = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """The bytes of a token of the vocabulary; a token outside the alphabet is taken literally."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; an empty one if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = files.read_json(file, _MOST_FILE_BYTES)
    except OSError as error:
        raise TokenizerError(f"cannot read {file}: {error}") from error
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds {type(content).__name__}; it must hold a JSON object")
    return content


@contextlib.contextmanager
def _backend_errors(complaint: str) -> Iterator[None]:
    """Turns errors of the `tokenizers` library into a TokenizerError that begins with `complaint`.

    The library raises bare Exceptions, and a bare BaseException if its Rust code panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{complaint}: {shortened(error, 200)}") from error


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        data = files.read_bytes(file, tokenizer_file.MOST_BYTES)
    except OSError as error:
        raise TokenizerError(f"cannot read {file}: {error}") from error
    try:
        parts = tokenizer_file.parse(data)
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    try:
        tokenizer_file.check(parts)
    except ValueError as error:
        raise TokenizerError(f"{file} is refused: {error}. {_NOT_OF_THIS_FAMILY}") from error
    with _backend_errors(f"{file} is not a tokenizer that can be read"):
        backend = Backend.from_str(data.decode())
    # The file may hold both as leftovers of training. They would cut or pad every prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_eos_token_ids(file: Path) -> list[int]:
    """The ids of `eos_token_id` in generation_config.json: it is absent, null, an id or a list."""
    value = _read_json(file).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise TokenizerError(f"{file}: eos_token_id is {shown(value)}; it must be one id or a list")
    return ids


def _read_chat_template(file: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template in `file`, or else the one in tokenizer_config.json, or else None.

    tokenizer_config.json has a string, or a list of {"name", "template"} whose "default" is taken.
    """
    if file.exists():
        return _read_template_file(file)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default", value)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"{file.parent}/tokenizer_config.json: chat_template is {type(value).__name__}; it "
            'must be a string, or a list of {"name", "template"} with one named "default"'
        )
    return value or None


def _read_template_file(file: Path) -> str:
    try:
        return files.read_bytes(file, _MOST_FILE_BYTES).decode()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {file}: {error}") from error


def _named_tokens(folder: Path, settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each token that `settings` names, as (key, content)."""
    for key in _NAMED_TOKENS:
        value = settings.get(key)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            if content:
                yield key, content
        elif value is not None:
            raise TokenizerError(
                f"{folder}: {key} is {shown(value)}; it must be a string or an object with a "
                'string "content"'
            )
