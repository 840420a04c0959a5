"""langchain-openai against a server: python langchain_client.py BASE_URL MODEL KEY"""

from __future__ import annotations

import asyncio
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = "681+734="
ANSWER = "1415"


@tool
def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


def main(url: str, model: str, key: str) -> None:
    chat = ChatOpenAI(base_url=url, model=model, api_key=key, temperature=0)
    answer = chat.invoke(QUESTION)
    assert answer.content.strip() == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0
    print("chat: invoke, with usage")
    assert "".join(piece.content for piece in chat.stream(QUESTION)) == answer.content
    print("chat: stream")
    many = asyncio.run(chat.abatch([QUESTION] * 8))
    assert {one.content for one in many} == {answer.content}
    print("chat: a batch of 8, asynchronous")
    with_tools = chat.bind_tools([add]).invoke(QUESTION)
    assert with_tools.content.strip() == ANSWER and not with_tools.tool_calls
    print("chat: with tools the model has not learnt, answered in text")
    text = OpenAI(base_url=url, model=model, api_key=key, temperature=0, max_tokens=12)
    assert ANSWER in text.invoke(QUESTION)
    print("completion: invoke")


if __name__ == "__main__":
    main(*sys.argv[1:])
