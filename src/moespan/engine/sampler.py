"""From logits to tokens. Every draw is a pure function of its row, its seed and its position.

So a seeded request gets the same tokens whatever shares its batch: one uniform number, made from
seed and position, picks from the cumulative distribution.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import torch
from torch import Tensor

from moespan.engine.plan import Sampled, SampleRow
from moespan.engine.request import TokenLogprobs
from moespan.memory import ToHost, to_device

# Logits divided by less could overflow; it is as good as greedy.
_LEAST_TEMPERATURE = 1e-6


class Sampling:
    """One token for each row, which the device may still be choosing.

    Attributes:
        token_ids: int32 [R], on the device of the logits; any valid id where these are not finite.

    Args:
        logits: float32 [R, V]; free to be overwritten by what the device is given next.
        rows: R descriptions of how to sample.
    """

    def __init__(self, logits: Tensor, rows: list[SampleRow]) -> None:
        self._rows = rows
        self.token_ids = _choose(logits, rows)
        # A row's largest and smallest show what is not finite in it, NaN too, without a copy of it.
        finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        chosen = torch.stack([self.token_ids, finite.int()])
        self._reported = [i for i, row in enumerate(rows) if row.logprobs is not None]
        scores: list[Tensor] = []
        if self._reported:
            at = _tensor(self._reported, torch.int64, logits)
            most = max(rows[i].logprobs or 0 for i in self._reported)
            scores = _scores(logits[at], self.token_ids[at], most)
        self._to_host = ToHost([chosen, *scores])

    def wait(self) -> list[Sampled]:
        """One entry for each row; its token is None when its logits are not all finite."""
        chosen, *scores = self._to_host.wait()
        token_ids, finite = chosen.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if scores:
            reported = [token_ids[i] for i in self._reported]
            for i, score in zip(self._reported, _to_logprobs(reported, scores), strict=True):
                if finite[i]:
                    top = score.top[: self._rows[i].logprobs]
                    logprobs[i] = TokenLogprobs(score.token_id, score.logprob, top)
        return [
            Sampled(token_id if is_finite else None, logprob)
            for token_id, is_finite, logprob in zip(token_ids, finite, logprobs, strict=True)
        ]


def sample(logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
    """Choose one token for each row of float32 logits [R, V], and wait for it."""
    return Sampling(logits, rows).wait()


def fill_in(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Put `sampled[i]` where `token_ids` [T] names it, as `~i`; both int32."""
    return torch.where(token_ids < 0, sampled[(~token_ids).clamp_(min=0)], token_ids)


def _choose(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """The tokens of all rows, int32 [R]; the host does not wait for them."""
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        at = _tensor(drawn, torch.int64, logits)
        tokens[at] = _draw(adjusted[at], [rows[i] for i in drawn])
    return tokens.int()


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of `token_ids` and of the `num_top` best under float32 logits [R, V]."""
    targets = _tensor(token_ids, torch.int32, logits)
    return _to_logprobs(token_ids, _scores(logits, targets, num_top))


def _scores(logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    """Log probabilities of int32 `token_ids` [R], and values and ids of the best [R, num_top]."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, token_ids.long()[:, None])[:, 0]
    return [own, *logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)]


def _to_logprobs(token_ids: list[int], scores: list[Tensor]) -> list[TokenLogprobs]:
    own, values, ids = (part.tolist() for part in scores)
    return [
        TokenLogprobs(token, logprob, list(zip(top_ids, top_values, strict=True)))
        for token, logprob, top_ids, top_values in zip(token_ids, own, ids, values, strict=True)
    ]


def _adjust(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Apply bias, penalties and bars, in this order; in a copy, if there are any."""
    biased = [(i, row.logit_bias) for i, row in enumerate(rows) if row.logit_bias]
    repeated = [
        (i, dict.fromkeys(sorted({*row.seen_prompt, *row.seen_output}), row.repetition_penalty))
        for i, row in enumerate(rows)
        if row.repetition_penalty != 1 and (row.seen_prompt or row.seen_output)
    ]
    penalized = [(i, row) for i, row in enumerate(rows) if row.seen_output]
    barred = [(i, dict.fromkeys(row.barred, -math.inf)) for i, row in enumerate(rows) if row.barred]
    if not (biased or repeated or penalized or barred):
        return logits
    logits = logits.clone()
    if biased:
        at, biases = _entries(biased, logits)
        logits[at] += biases
    if repeated:
        at, penalties = _entries(repeated, logits)
        values = logits[at]
        logits[at] = torch.where(values > 0, values / penalties, values * penalties)
    if penalized:
        at, penalties = _entries([(i, _penalties(row)) for i, row in penalized], logits)
        logits[at] -= penalties
    if barred:
        at, bars = _entries(barred, logits)
        logits[at] = bars
    return logits


def _penalties(row: SampleRow) -> dict[int, float]:
    return {
        token_id: row.frequency_penalty * count + row.presence_penalty
        for token_id, count in row.seen_output.items()
    }


def _entries(
    values: list[tuple[int, dict[int, float]]], like: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Numbers for tokens of rows as (rows, token ids), which index logits, and float32 numbers."""
    rows = [row for row, one in values for _ in one]
    token_ids = [token_id for _, one in values for token_id in one]
    at = torch.tensor([rows, token_ids])
    numbers = torch.tensor([number for _, one in values for number in one.values()])
    (at,), (numbers,) = to_device([at], like.device), to_device([numbers], like.device)
    return (at[0], at[1]), numbers


def _draw(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw one token for each row of [R, V] → int64 [R]."""
    temperature = [max(row.temperature, _LEAST_TEMPERATURE) for row in rows]
    probabilities = (logits / _column(temperature, logits)).softmax(-1)
    numbers = [_uniform(row.seed, row.position) for row in rows]
    uniform = _tensor(numbers, torch.float64, logits)[:, None]
    tokens = _invert(probabilities, uniform)
    # Sorting changes which token a number picks, so no row is sorted for another one's sake.
    truncated = [i for i, row in enumerate(rows) if row.top_p < 1 or row.min_p > 0 or row.top_k > 0]
    if truncated:
        at = _tensor(truncated, torch.int64, logits)
        tokens[at] = _draw_truncated(probabilities[at], uniform[at], [rows[i] for i in truncated])
    return tokens


def _draw_truncated(probabilities: Tensor, uniform: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw from what min_p and top_k leave of each row of [R, V], and top_p of that → [R]."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    vocab_size = ordered.shape[-1]
    ranks = torch.arange(vocab_size, device=ordered.device)
    dropped = ranks >= _column(
        [row.top_k if row.top_k > 0 else vocab_size for row in rows], ordered
    )
    dropped |= ordered < ordered[:, :1] * _column([row.min_p for row in rows], ordered)
    kept = ordered.masked_fill(dropped, 0)
    kept /= kept.sum(-1, keepdim=True)
    # The mass before a token decides, so that the token that crosses top_p is kept.
    mass_before = kept.cumsum(-1) - kept
    dropped = mass_before >= _column([row.top_p if row.top_p < 1 else 2.0 for row in rows], ordered)
    dropped[:, 0] = False
    return order.gather(-1, _invert(kept.masked_fill(dropped, 0), uniform)[:, None])[:, 0]


def _column(values: list[float], like: Tensor) -> Tensor:
    return _tensor(values, torch.float32, like)[:, None]


def _tensor(values: list[float] | list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """`values` on the device of `like`, which is not waited for."""
    return to_device([torch.tensor(values, dtype=dtype)], like.device)[0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of [R, V] passes its share `uniform` [R, 1] of the whole → [R]."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # Strictly past the target: a token of weight 0 is never picked.
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    # There is one, as `_uniform` stays below 1 by more than rounding; unless weights are NaN.
    return picked.clamp_(max=weights.shape[-1] - 1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1 − 2⁻⁵²] from 52 bits of BLAKE2b(seed, position)."""
    data = seed.to_bytes(8, "little", signed=False) + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 12) / (1 << 52)
