"""The openai package against a server: python openai_client.py BASE_URL MODEL KEY

Checks what the package makes of the answers, and prints a line for each thing checked.
"""

from __future__ import annotations

import asyncio
import sys

import openai

QUESTION = "681+734="
ANSWER = "1415"


def main(url: str, model: str, key: str) -> None:
    client = openai.OpenAI(base_url=url, api_key=key)
    models(client, model)
    completions(client, model)
    scores(client, model)
    chat(client, model)
    streams(client, model)
    stream_helper(client, model)
    errors(client, url, model)
    asyncio.run(many_at_once(url, model, key))


def models(client: openai.OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    print("models: listed and retrieved")


def completions(client: openai.OpenAI, model: str) -> None:
    prompts = [QUESTION, "sort 30 70 7:"]
    many = client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=12, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text
    assert ANSWER in many.choices[0].text and "7 30 70" in many.choices[2].text
    assert many.usage is not None
    assert many.usage.total_tokens == many.usage.prompt_tokens + many.usage.completion_tokens
    stopped = client.completions.create(
        model=model, prompt=QUESTION, temperature=0, max_tokens=12, stop=["4"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "4" not in stopped.choices[0].text and "1" in stopped.choices[0].text
    cut = client.completions.create(model=model, prompt=QUESTION, temperature=0, max_tokens=1)
    assert cut.choices[0].finish_reason == "length"
    print("completions: prompts x n, stop strings, finish reasons, usage")


def scores(client: openai.OpenAI, model: str) -> None:
    scored = client.completions.create(
        model=model, prompt=QUESTION, temperature=0, max_tokens=3, echo=True, logprobs=2
    )
    entry = scored.choices[0].logprobs
    assert entry is not None and entry.tokens and entry.token_logprobs and entry.top_logprobs
    lengths = {len(entry.tokens), len(entry.token_logprobs), len(entry.top_logprobs)}
    assert lengths == {len(entry.text_offset or [])}
    assert entry.token_logprobs[0] is None
    assert all(value <= 0 for value in entry.token_logprobs[1:])
    pairs = zip(entry.tokens[1:], entry.top_logprobs[1:], strict=True)
    assert all(token in best for token, best in pairs)
    assert scored.choices[0].text.startswith(QUESTION)
    print("completions: echo with log probabilities")


def chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content is not None
    assert choice.message.content.strip() == ANSWER
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    spelled = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert spelled.decode().strip().startswith(ANSWER)
    parts = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        temperature=0,
        max_completion_tokens=20,
    )
    assert parts.choices[0].message.content == choice.message.content
    print("chat: text and text parts, log probabilities whose bytes join to the text")


def streams(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    text, reasons, usage = "", [], None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert usage is None and chunk.usage is None
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert text == whole.choices[0].message.content
    assert [reason for reason in reasons if reason] == ["stop"] and reasons[-1] == "stop"
    assert usage == whole.usage
    pieces = client.completions.create(
        model=model, prompt=QUESTION, temperature=0, max_tokens=12, stream=True
    )
    assert ANSWER in "".join(chunk.choices[0].text for chunk in pieces)
    print("streams: the same text and usage, one finish reason")


def stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert (final.choices[0].message.content or "").strip() == ANSWER
    print("streams: the package's helper")


def errors(client: openai.OpenAI, url: str, model: str) -> None:
    for kind, call in (
        (openai.NotFoundError, lambda: client.models.retrieve("no/such-model")),
        (
            openai.NotFoundError,
            lambda: client.completions.create(model="no/such-model", prompt=QUESTION),
        ),
        (
            openai.BadRequestError,
            lambda: client.completions.create(model=model, prompt=QUESTION, temperature=-1),
        ),
        (
            openai.BadRequestError,
            lambda: client.completions.create(model=model, prompt=[1] * 100_000),
        ),
        (
            openai.AuthenticationError,
            lambda: openai.OpenAI(base_url=url, api_key="wrong").models.list(),
        ),
    ):
        try:
            call()
        except kind as error:
            assert isinstance(error.body, dict), error.body
            assert error.body["message"] and "type" in error.body and "code" in error.body
        else:
            raise AssertionError(f"no {kind.__name__}")
    print("errors: 400, 401 and 404 as the package's own, with message, type and code")


async def many_at_once(url: str, model: str, key: str) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key=key)

    async def one(seed: int) -> str:
        stream = await client.completions.create(
            model=model, prompt=QUESTION, temperature=0.7, seed=seed, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    first = await asyncio.gather(*(one(seed) for seed in range(24)))
    alone = [await one(seed) for seed in range(3)]
    assert all(first)
    await client.close()
    num_equal = sum(a == b for a, b in zip(first, alone, strict=False))
    print(f"asynchronous: 24 streams at once; {num_equal} of 3 as alone")


if __name__ == "__main__":
    main(*sys.argv[1:])
