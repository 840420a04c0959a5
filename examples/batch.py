"""Any number of requests from a file, each answered as it finishes: python examples/batch.py

The command line does the same, and can resume after a crash:
moespan generate models/quickstart --input examples/questions.jsonl --output answers.jsonl
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moespan import LLM, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "quickstart"
QUESTIONS = Path(__file__).with_name("questions.jsonl")


def main() -> None:
    names: dict[str, str] = {}  # id of the request → id in the file

    with LLM(str(MODEL)) as llm:

        def requests() -> Iterator[tuple[Any, Any]]:
            for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
                item = json.loads(line)
                defaults = {"temperature": 0, "max_tokens": 100}
                params = SamplingParams.from_dict({**defaults, **item.get("params", {})})
                text, request = llm.request(item["prompt"], params)
                names[request.id] = item["id"]
                yield text, request

        # Requests are taken as the engine has room for them, so the file may be of any length.
        for output in llm.stream(requests()):
            print(names[output.request_id], output.outputs[0].text, flush=True)


if __name__ == "__main__":
    main()
