"""langchain-openai against a server: python langchain_client.py BASE_URL MODEL KEY"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import Field

QUESTION = "681+734="
ANSWER = "1415"

Number = Annotated[int, Field(ge=0, le=999)]


@tool
def add(first: Number, second: Number) -> int:
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
    calling = chat.bind_tools([add], tool_choice="add")
    (call,) = calling.invoke(QUESTION, max_tokens=200).tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"first", "second"}
    first, *others = calling.stream(QUESTION, max_tokens=200)
    assert sum(others, first).tool_calls[0]["args"] == call["args"]
    print("chat: a call that is demanded, whole and as a stream")
    asked = HumanMessage(QUESTION)
    calls = chat.bind_tools([add], tool_choice="add").invoke([asked], max_tokens=200)
    results = [ToolMessage("1415", tool_call_id=one["id"]) for one in calls.tool_calls]
    assert chat.bind_tools([add]).invoke([asked, calls, *results], max_tokens=8).content
    print("chat: a call and its result sent back, as agents do")
    text = OpenAI(base_url=url, model=model, api_key=key, temperature=0, max_tokens=12)
    assert ANSWER in text.invoke(QUESTION)
    print("completion: invoke")


if __name__ == "__main__":
    main(*sys.argv[1:])
