"""From logits to tokens. Every draw is a pure function of its row, its seed and its position.

One uniform number, made from seed and position, picks from the cumulative distribution. So a seeded
request whose logits do not change gets the same tokens in any batch. In float32 they change by less
than what decides between tokens; in 16 bits the batch rounds them differently.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from moespan.engine.request import TokenLogprobs
from moespan.engine.step import Sampled, SampleRow
from moespan.memory import ToHost, on_host, to_device

# Logits divided by less could overflow; at this temperature, a draw is as good as greedy.
_LEAST_TEMPERATURE = 1e-6
# Number of candidates tried first, and the factor for more if these do not suffice. For a language
# model, top_p rarely leaves more than a few hundred tokens; otherwise it may leave any number.
_FIRST_CANDIDATES, _GROWTH = 256, 32


class Sampling:
    """One token for each row, possibly still being chosen on the device.

    Attributes:
        token_ids: int32 [R], on the device of the logits; any valid id for a row with logits that
            are not finite.

    Args:
        logits: [R, V] in the activations' dtype; results computed from them are float32. The next
            work on the device may overwrite them.
        rows: how to sample each of the R rows.
    """

    def __init__(self, logits: Tensor, rows: list[SampleRow]) -> None:
        self._rows = rows
        # Faster than argmax on CPUs, and also takes the first of equal logits.
        largest, best = logits.max(-1)
        self.token_ids = _choose(logits, best.int(), rows)
        # The largest and smallest logit show any Inf or NaN of a row, without a copy of the row.
        finite = largest.isfinite() & logits.amin(-1).isfinite()
        chosen = torch.stack([self.token_ids, finite.int()])
        self._reported = [i for i, row in enumerate(rows) if row.logprobs is not None]
        scores: list[Tensor] = []
        if self._reported:
            at = _tensor(self._reported, torch.int64, logits)
            most = max(rows[i].logprobs or 0 for i in self._reported)
            scores = _scores(logits[at].float(), self.token_ids[at], most)
        self._to_host = ToHost([chosen, *scores])

    def wait(self) -> list[Sampled]:
        """One entry for each row; its token is None if the row's logits are not all finite."""
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
    """Choose one token for each row of logits [R, V], and wait for the tokens."""
    return Sampling(logits, rows).wait()


def fill_in(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Replace each `~i` in `token_ids` [T] by `sampled[i]`; both int32."""
    return torch.where(token_ids < 0, sampled[(~token_ids).clamp_(min=0)], token_ids)


def _choose(logits: Tensor, best: Tensor, rows: list[SampleRow]) -> Tensor:
    """The tokens of all rows, int32 [R]; the host does not wait for them.

    Args:
        best: index of each row's largest logit, the first of equal ones, int32 [R]; overwritten.
    """
    by_method: defaultdict[Callable[[Tensor, list[SampleRow]], Tensor], list[int]] = defaultdict(
        list
    )
    for i, row in enumerate(rows):
        if row.temperature > 0:
            by_method[_draw_truncated if _is_truncated(row) else _draw].append(i)
        elif _is_adjusted(row):
            by_method[_take_best].append(i)
    # Each row takes the cheapest path that its own parameters allow.
    for choose, numbers in by_method.items():
        at, chosen = _tensor(numbers, torch.int64, logits), [rows[i] for i in numbers]
        copied = logits[at].float()
        _adjust(copied, chosen)
        best[at] = choose(copied, chosen).int()
    return best


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of `token_ids` and of the `num_top` best under float32 logits [R, V]."""
    targets = _tensor(token_ids, torch.int32, logits)
    return _to_logprobs(token_ids, _scores(logits, targets, num_top))


def _scores(logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    """Log probabilities of int32 `token_ids` [R]; then the best ones and their ids [R, num_top]."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, token_ids.long()[:, None])[:, 0]
    return [own, *logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)]


def _to_logprobs(token_ids: list[int], scores: list[Tensor]) -> list[TokenLogprobs]:
    own, values, ids = (part.tolist() for part in scores)
    return [
        TokenLogprobs(token, logprob, list(zip(top_ids, top_values, strict=True)))
        for token, logprob, top_ids, top_values in zip(token_ids, own, ids, values, strict=True)
    ]


def _is_adjusted(row: SampleRow) -> bool:
    return bool(
        row.logit_bias
        or row.barred
        or row.seen_output
        or (row.repetition_penalty != 1 and row.seen_prompt)
    )


def _adjust(logits: Tensor, rows: list[SampleRow]) -> None:
    """Apply biases, penalties and bars, in this order, to float32 logits [R, V], in place."""
    biased = [(i, row.logit_bias) for i, row in enumerate(rows) if row.logit_bias]
    repeated = [
        (i, dict.fromkeys(sorted({*row.seen_prompt, *row.seen_output}), row.repetition_penalty))
        for i, row in enumerate(rows)
        if row.repetition_penalty != 1 and (row.seen_prompt or row.seen_output)
    ]
    penalized = [(i, row) for i, row in enumerate(rows) if row.seen_output]
    barred = [(i, dict.fromkeys(row.barred, -math.inf)) for i, row in enumerate(rows) if row.barred]
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


def _penalties(row: SampleRow) -> dict[int, float]:
    return {
        token_id: row.frequency_penalty * count + row.presence_penalty
        for token_id, count in row.seen_output.items()
    }


def _entries(
    values: list[tuple[int, dict[int, float]]], like: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Numbers for tokens of rows: (rows, token ids), to index logits with, and float32 numbers."""
    rows = [row for row, one in values for _ in one]
    token_ids = [token_id for _, one in values for token_id in one]
    at = torch.tensor([rows, token_ids])
    numbers = torch.tensor([number for _, one in values for number in one.values()])
    (at,), (numbers,) = to_device([at], like.device), to_device([numbers], like.device)
    return (at[0], at[1]), numbers


def _take_best(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """The best token of each row of float32 logits [R, V] → int64 [R]."""
    return logits.max(-1).indices


def _draw(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw from all tokens of each row of float32 logits [R, V], overwritten → int64 [R]."""
    cumulative = _probabilities(logits, rows).cumsum(-1, dtype=torch.float64)
    return _invert(cumulative, _uniforms(logits, rows) * cumulative[:, -1:])


def _is_truncated(row: SampleRow) -> bool:
    return row.top_p < 1 or row.min_p > 0 or row.top_k > 0


def _draw_truncated(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw from the tokens that min_p and top_k leave, and then top_p, of each row of float32
    logits [R, V], overwritten → int64 [R]."""
    vocab_size = logits.shape[-1]
    # The host would have to wait for a device to know whether fewer candidates suffice.
    num_candidates = min(_FIRST_CANDIDATES, vocab_size) if on_host(logits) else vocab_size
    return _draw_from_best(
        num_candidates,
        _probabilities(logits, rows),
        _uniforms(logits, rows),
        _column([row.top_k if row.top_k > 0 else vocab_size for row in rows], logits),
        _column([row.min_p for row in rows], logits),
        _column([row.top_p if row.top_p < 1 else 2.0 for row in rows], logits),
    )


def _draw_from_best(
    num_candidates: int,
    probabilities: Tensor,
    uniform: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    top_p: Tensor,
) -> Tensor:
    """Draw from the best tokens of each row of [R, V] → int64 [R].

    The tokens are the same for any number of candidates: rows for which they may not suffice are
    drawn again with more of them.

    Args:
        uniform, top_k, min_p, top_p: one value for each row [R, 1].
    """
    vocab_size = probabilities.shape[-1]
    ordered, order = _best(probabilities, num_candidates)
    left = torch.arange(num_candidates, device=ordered.device) < top_k
    left &= ordered >= ordered[:, :1] * min_p
    left &= ordered > 0
    # In float64 and in order, so that later candidates do not change the sums.
    cumulative = ordered.masked_fill(~left, 0).cumsum(-1, dtype=torch.float64)
    # top_p applies to the mass that min_p and top_k leave; without them that is 1.
    is_partial = (top_k < vocab_size) | (min_p > 0)
    whole = cumulative[:, -1:].masked_fill(~is_partial, 1)
    # The mass before a token decides, so that the token that crosses top_p is kept.
    num_kept = torch.searchsorted(cumulative, top_p * whole) + 1
    num_kept = torch.minimum(num_kept, left.sum(-1, keepdim=True)).clamp_(min=1)
    last_kept = num_kept - 1
    picked = _invert(cumulative, uniform * cumulative.gather(-1, last_kept))
    tokens = order.gather(-1, picked[:, None])[:, 0]
    if num_candidates == vocab_size:
        return tokens
    # Tokens that are not candidates may equal the last candidate, and come before it.
    is_settled = ordered.gather(-1, last_kept) > ordered[:, -1:]
    is_settled &= ~(is_partial & left[:, -1:])
    again = (~is_settled[:, 0]).nonzero()[:, 0]
    if len(again):
        more = (part[again] for part in (probabilities, uniform, top_k, min_p, top_p))
        tokens[again] = _draw_from_best(min(num_candidates * _GROWTH, vocab_size), *more)
    return tokens


def _best(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row of [R, V] in order, and their token ids: [R, count] each.

    Ties are broken by token id. Among values equal to the last, any subset may be returned.
    """
    if count == probabilities.shape[-1]:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        return ordered, order
    order = probabilities.topk(count, sorted=False).indices.sort(-1).values
    ordered, at = probabilities.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return ordered, order.gather(-1, at)


def _probabilities(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Softmax of float32 logits [R, V], overwritten, at the rows' temperatures."""
    temperatures = [max(row.temperature, _LEAST_TEMPERATURE) for row in rows]
    return logits.div_(_column(temperatures, logits)).softmax(-1)


def _uniforms(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """The uniform number of each row, float64 [R, 1]."""
    return _tensor([_uniform(row.seed, row.position) for row in rows], torch.float64, logits)[
        :, None
    ]


def _column(values: list[float], like: Tensor) -> Tensor:
    return _tensor(values, torch.float32, like)[:, None]


def _tensor(values: list[float] | list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """`values` on the device of `like`; the host does not wait for the copy."""
    return to_device([torch.tensor(values, dtype=dtype)], like.device)[0]


def _invert(cumulative: Tensor, targets: Tensor) -> Tensor:
    """Index of the first running sum, float64 [R, V], above `targets` [R, 1] → int64 [R]."""
    # Strictly above the target, so that a token of weight 0 is never picked.
    picked = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # One exists unless sums are NaN, because `_uniform` is below 1 by more than rounding errors.
    return picked.clamp_(max=cumulative.shape[-1] - 1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1 − 2⁻⁵²] from 52 bits of BLAKE2b(seed, position)."""
    data = seed.to_bytes(8, "little", signed=False) + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 12) / (1 << 52)
