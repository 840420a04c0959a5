"""LiteLLM against a server: python litellm_client.py BASE_URL MODEL KEY"""

from __future__ import annotations

import sys

import litellm

QUESTION = "681+734="
ANSWER = "1415"


def main(url: str, model: str, key: str) -> None:
    litellm.telemetry = False
    where = {"model": f"hosted_vllm/{model}", "api_base": url, "api_key": key}
    ask = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    answer = litellm.completion(**where, **ask)
    assert answer.choices[0].message.content.strip() == ANSWER
    print("completion: as a hosted vLLM")
    pieces = litellm.completion(**where, **ask, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == answer.choices[0].message.content
    print("completion: streamed")
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        api_base=url,
        api_key=key,
        prompt=QUESTION,
        temperature=0,
        max_tokens=12,
    )
    assert ANSWER in text.choices[0].text
    print("text completion")


if __name__ == "__main__":
    main(*sys.argv[1:])
