"""A conversation of several turns: python examples/chat.py "681+734=" "sort 30 70 7:" """

import sys
from pathlib import Path

from moespan import LLM, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "quickstart"


def main(questions: list[str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    messages: list[dict[str, str]] = []
    with LLM(str(MODEL)) as llm:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = llm.chat(messages, params)[0].outputs[0].text.strip()
            messages.append({"role": "assistant", "content": answer})
            print(f"> {question}\n{answer}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["681+734=", "sort 30 70 7 89 97:"])
