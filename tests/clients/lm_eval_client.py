"""lm-eval's API models against a server: python lm_eval_client.py BASE_URL MODEL KEY EXPECTED.json

EXPECTED.json holds what the engine itself computes: `pairs` of context and continuation with their
`scores` (log probability, is greedy), and `contexts` with their greedy texts, as prompts of token
ids and of text. lm-eval encodes without a begin token, which the server puts before text only; so
lm-eval's log-likelihoods are right with token ids only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

LIMITS = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}


def main(url: str, model: str, key: str, expected_file: str) -> None:
    os.environ["OPENAI_API_KEY"] = key
    expected = json.loads(Path(expected_file).read_text(encoding="utf-8"))
    for sends_ids in (True, False):
        client = LocalCompletionsAPI(
            base_url=f"{url}/completions",
            model=model,
            tokenizer_backend="remote",
            tokenized_requests=sends_ids,
            auth_token=key,
            max_retries=2,
        )
        kind = "ids" if sends_ids else "text"
        name = f"local-completions, prompts of {kind}"
        if sends_ids:
            score(client, expected, name)
        generate(client, expected["contexts"], expected[f"texts_after_{kind}"], name)
    chat(f"{url}/chat/completions", model)


def score(client: Any, expected: dict[str, Any], name: str) -> None:
    requests = [
        Instance("loglikelihood", {}, tuple(pair), index)
        for index, pair in enumerate(expected["pairs"])
    ]
    got = client.loglikelihood(requests, disable_tqdm=True)
    for (value, is_greedy), (right, is_right_greedy) in zip(got, expected["scores"], strict=True):
        assert abs(value - right) < 1e-3, (value, right)
        assert is_greedy == is_right_greedy
    print(f"{name}: {len(got)} log-likelihoods within 1e-3 of the engine's own")


def generate(client: Any, contexts: list[str], texts: list[str], name: str) -> None:
    requests = [
        Instance("generate_until", {}, (context, dict(LIMITS)), index)
        for index, context in enumerate(contexts)
    ]
    got = client.generate_until(requests, disable_tqdm=True)
    assert got == texts, (got, texts)
    print(f"{name}: {len(got)} texts as the engine's own")


def chat(url: str, model: str) -> None:
    client = LocalChatCompletion(base_url=url, model=model, max_retries=2)
    messages = client.apply_chat_template([{"role": "user", "content": "681+734="}])
    (text,) = client.generate_until(
        [Instance("generate_until", {}, (messages, dict(LIMITS)), 0)], disable_tqdm=True
    )
    assert text.strip() == "1415", text
    print("local-chat-completions: generate_until")


if __name__ == "__main__":
    main(*sys.argv[1:])
