"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shapes."""

from __future__ import annotations

from moespan.serve.bodies import DetokenizeBody, TokenizeBody, decode
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal, bad
from moespan.serve.replies import Detokenized, Json, Tokens
from moespan.serve.sampling import chat_prompt, encode
from moespan.serve.served import ServedModel
from moespan.text.tokenizer import Tokenizer

_MOST_TOKENS = 1 << 20


def tokenize(body: bytes, model: ServedModel, options: ServeOptions) -> tuple[Tokens, list[str]]:
    """Token ids of a prompt or of messages, and the names of fields without effect."""
    asked, ignored = decode(body, TokenizeBody, options.strict_fields)
    model.name_of(asked.model)
    tokenizer = _tokenizer(model)
    if (asked.prompt is None) == (asked.messages is None):
        raise bad("exactly one of prompt and messages is required", "prompt")
    if asked.prompt is None:
        _, ids = chat_prompt(asked, model, may_exceed=True)
    else:
        add = True if asked.add_special_tokens is None else asked.add_special_tokens
        _, ids = encode(asked.prompt, "prompt", model, add, may_exceed=True)
    texts = (
        [tokenizer.token_text(token_id) for token_id in ids] if asked.return_token_strs else None
    )
    return Tokens(len(ids), model.max_model_len, ids, texts), ignored


def detokenize(
    body: bytes, model: ServedModel, options: ServeOptions
) -> tuple[Detokenized, list[str]]:
    """The text of token ids, special tokens included, and the names of fields without effect."""
    asked, ignored = decode(body, DetokenizeBody, options.strict_fields)
    model.name_of(asked.model)
    if len(asked.tokens) > _MOST_TOKENS:
        raise bad(f"tokens holds {len(asked.tokens)} ids; at most {_MOST_TOKENS}", "tokens")
    wrong = next((one for one in asked.tokens if not 0 <= one < model.vocab_size), None)
    if wrong is not None:
        raise bad(f"tokens: id {wrong} is not within 0..{model.vocab_size - 1}", "tokens")
    return Detokenized(_tokenizer(model).decode(asked.tokens, skip_special_tokens=False)), ignored


def tokenizer_info(model: ServedModel) -> Json:
    """What clients need to encode and render as this server does."""
    tokenizer = _tokenizer(model)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
        **tokenizer.named_tokens,
        "chat_template": tokenizer.chat_template,
        "model_max_length": model.max_model_len,
        "vocab_size": model.vocab_size,
    }


def _tokenizer(model: ServedModel) -> Tokenizer:
    if model.tokenizer is None:
        raise Refusal(400, "this checkpoint has no tokenizer; send token ids", param="model")
    return model.tokenizer
