"""Log probabilities as evaluation clients read them, streamed or not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.scene import Served, events, logprob, play, quickstart

TEXTS = [" 42", "森林 🙂!", "ü<|begin|>é"]


def encode(text: str, begins: bool = True) -> list[int]:
    tokenizer = quickstart().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text, add_special_tokens=begins)


def parse_as_lm_eval(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """What lm-eval makes of a choice with `echo`, `logprobs=1` and `max_tokens=1`: the sum over the
    continuation, and whether it is what the model would have said."""
    logprobs = choice["logprobs"]
    scores = logprobs["token_logprobs"][num_context:-1]
    tops = logprobs["top_logprobs"][num_context:-1]
    return sum(scores), all(s == max(top.values()) for s, top in zip(scores, tops, strict=True))


def joined(stream: list[Any], index: int = 0) -> dict[str, Any]:
    """The choice that the pieces of a stream make."""
    whole: dict[str, Any] = {"text": "", "logprobs": None}
    for event in stream:
        for piece in event["choices"]:
            if piece["index"] != index:
                continue
            whole["text"] += piece["text"]
            whole["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {key: [] for key in piece["logprobs"]}
                for key, values in piece["logprobs"].items():
                    whole["logprobs"][key] += values
    return whole


def test_lm_eval_reads_the_log_likelihood_of_a_continuation_of_token_ids():
    async def script(served: Served) -> None:
        context, continuation = encode("12+30="), encode(" 42", begins=False)
        response = await served.complete(
            prompt=[[*context, *continuation], continuation],
            echo=True,
            logprobs=1,
            max_tokens=1,
            temperature=0,
            seed=1234,
        )
        first, second = response.json()["choices"]
        total, _ = parse_as_lm_eval(first, len(context))
        expected = [logprob(t, p) for p, t in enumerate([*context, *continuation]) if p][-3:]
        assert total == pytest.approx(sum(expected))
        assert second["logprobs"]["token_logprobs"][0] is None
        assert len(first["logprobs"]["tokens"]) == len(context) + len(continuation) + 1

    play(script)


def test_lm_eval_sees_whether_the_continuation_is_what_the_model_would_say():
    async def script(served: Served) -> None:
        ids = encode("12+30=")
        best = [
            max(range(400), key=lambda token: (logprob(token, place), -token))
            for place in range(len(ids), len(ids) + 3)
        ]
        for continuation, is_greedy in ((best, True), ([*best[:2], best[2] + 1], False)):
            response = await served.complete(
                prompt=[*ids, *continuation], echo=True, logprobs=1, max_tokens=1
            )
            choice = response.json()["choices"][0]
            assert parse_as_lm_eval(choice, len(ids))[1] is is_greedy

    play(script)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("hides", [False, True])
def test_the_lists_have_equal_length_and_offsets_count_characters(
    text: str, echo: bool, hides: bool
):
    async def script(served: Served) -> None:
        for prompt in ("12 森=", encode("12 森=")):
            body: dict[str, Any] = {
                "prompt": prompt,
                "echo": echo,
                "logprobs": 2,
                "skip_special_tokens": hides,
                "max_tokens": 40,
            }
            choice = (await served.complete(**body)).json()["choices"][0]
            logprobs = choice["logprobs"]
            assert len({len(values) for values in logprobs.values()}) == 1
            shows_begin = isinstance(prompt, list) and not hides
            shown = ("<|begin|>" if shows_begin else "") + "12 森="
            whole = choice["text"] if echo else shown + choice["text"]
            assert whole.startswith(shown)
            offsets = logprobs["text_offset"]
            assert offsets[0] == (0 if echo else len(shown))
            assert offsets == sorted(offsets) and offsets[-1] <= len(whole)
            for token, offset in zip(logprobs["tokens"], offsets, strict=True):
                if not token.startswith(("bytes:", "<|")):
                    assert whole[offset:].startswith(token), (token, offset)
            assert logprobs["tokens"][-1] == "<|end|>", "the EOS that ended it has an entry"
            assert (logprobs["token_logprobs"][0] is None) is echo
            for score, top, token in zip(
                *(logprobs[key] for key in ("token_logprobs", "top_logprobs", "tokens")),
                strict=True,
            ):
                assert score is None or top[token] == score
                assert top is None or 2 <= len(top) <= 3
            stream = events(await served.complete(**body, stream=True))
            assert joined(stream) == {
                key: choice[key] for key in ("text", "logprobs", "finish_reason")
            }

    play(script, texts=[text])


def test_a_token_that_begins_within_a_character_has_its_offset():
    async def script(served: Served) -> None:
        response = await served.complete(prompt="a🙂b", echo=True, logprobs=0, max_tokens=1)
        logprobs = response.json()["choices"][0]["logprobs"]
        assert logprobs["tokens"][0] == "<|begin|>"
        pieces = dict.fromkeys(logprobs["text_offset"][1:])
        assert list(pieces) == [0, 1, 2, 3]
        assert logprobs["text_offset"].count(1) > 1, "the character has several tokens"
        assert all("\ufffd" not in token for token in logprobs["tokens"])

    play(script)


def test_no_logprobs_unless_asked_for():
    async def script(served: Served) -> None:
        for route in (served.complete, served.chat):
            assert (await route()).json()["choices"][0]["logprobs"] is None
        choice = (await served.complete(logprobs=0)).json()["choices"][0]
        for token, top in zip(
            choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True
        ):
            assert list(top) == [token]

    play(script)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_chat_join_to_its_text(text: str):
    async def script(served: Served) -> None:
        body = {"logprobs": True, "top_logprobs": 3}
        choice = (await served.chat(**body)).json()["choices"][0]
        content = choice["logprobs"]["content"]
        told = bytes(byte for token in content for byte in token["bytes"])
        assert told.decode() == choice["message"]["content"]
        assert len(content) == len(encode(text, begins=False)) + 1, "EOS has an entry"
        for place, token in enumerate(content):
            assert len(token["top_logprobs"]) == 3
            assert "\ufffd" not in token["token"]
            scores = [top["logprob"] for top in token["top_logprobs"]]
            assert scores == sorted(scores, reverse=True) and token["logprob"] <= scores[0], place
        stream = events(await served.chat(**body, stream=True))
        streamed = [
            token
            for event in stream
            for piece in event["choices"]
            for token in (piece["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == content

    play(script, texts=[text])


def test_the_prompts_log_probabilities_in_vllms_form():
    async def script(served: Served) -> None:
        ids = encode("12+30=")
        chat = (await served.chat(prompt_logprobs=1)).json()
        assert chat["prompt_logprobs"][0] is None
        body = (await served.complete(prompt_logprobs=1, n=2, prompt=["12+30=", "7"])).json()
        for choice, prompt in zip(
            body["choices"], [ids, ids, encode("7"), encode("7")], strict=True
        ):
            first, *rest = choice["prompt_logprobs"]
            assert first is None and len(rest) == len(prompt) - 1
            for place, (token, entry) in enumerate(zip(prompt[1:], rest, strict=True), 1):
                assert entry[str(token)]["logprob"] == logprob(token, place)
                (best,) = [one for one in entry.values() if one["rank"] == 1]
                assert best["logprob"] >= entry[str(token)]["logprob"]
        assert "prompt_logprobs" not in (await served.complete()).json()["choices"][0]
        response = await served.complete(prompt_logprobs=1, stream=True)
        assert response.status_code == 400 and "needs stream=false" in response.text

    play(script)


def test_tokens_are_shown_by_their_ids_if_asked():
    async def script(served: Served) -> None:
        ids = encode(" 42", begins=False)
        body = {"return_tokens_as_token_ids": True, "return_token_ids": True}
        choice = (await served.complete(logprobs=1, **body)).json()["choices"][0]
        assert choice["logprobs"]["tokens"][:-1] == [f"token_id:{token}" for token in ids]
        assert choice["token_ids"][:-1] == ids
        assert choice["prompt_token_ids"] == encode("12+30=")
        chat = (await served.chat(logprobs=True, **body)).json()
        assert [one["token"] for one in chat["choices"][0]["logprobs"]["content"]][:-1] == [
            f"token_id:{token}" for token in ids
        ]
        assert chat["choices"][0]["token_ids"][:-1] == ids
        assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
        stream = events(await served.complete(stream=True, **body))
        told = [token for event in stream for token in event["choices"][0]["token_ids"]]
        assert told[:-1] == ids
        assert "prompt_token_ids" in stream[0]["choices"][0]
        assert "prompt_token_ids" not in stream[1]["choices"][0]

    play(script)
