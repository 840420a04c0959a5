"""From logits to tokens. Every draw is a pure function of its row and its position.

One uniform number, made from seed and position, picks from the cumulative distribution. So a seeded
request whose logits do not change gets the same tokens in any batch. In float32 they change by less
than what decides between tokens; in 16 bits the batch rounds them differently.

CPUs and GPUs sum the distribution in float64 and search the sums. NPUs round it to multiples of
2⁻³⁰, sum integers, and count the sums that do not exceed the target (`_draw_in_integers`). Both
keep the same tokens, but may draw different ones from the same logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from moespan.device import DEVICES
from moespan.engine.request import TokenLogprobs
from moespan.engine.step import Sampled, SampleRow
from moespan.memory import ToHost, on_host, to_device

# Logits divided by less could overflow; at this temperature, a draw is as good as greedy.
_LEAST_TEMPERATURE = 1e-6
# Number of candidates tried first, and the factor for more if these do not suffice. For a language
# model, top_p rarely leaves more than a few hundred tokens; otherwise it may leave any number.
_FIRST_CANDIDATES, _GROWTH = 256, 32
# Where integers are summed: the weight of all tokens together, and the largest top_k for which the
# device looks for the best tokens only, instead of sorting the vocabulary.
_WHOLE_WEIGHT, _MOST_BEST = 1 << 30, 1024

_Method = Callable[[Tensor, list[SampleRow], list[float]], Tensor]
"""Chooses a token for each row of float32 logits [R, V], which may be overwritten → [R]. The last
argument is the uniform number of each row; greedy rows have none."""


class Sampling:
    """One token for each row, possibly still being chosen on the device.

    Attributes:
        token_ids: int32 [R], on the device of the logits; any valid id for a row with logits that
            are not finite.

    Args:
        logits: [R, V] in the activations' dtype; results computed from them are float32. The next
            work on the device may overwrite them.
        rows: how to sample each of the R rows.
        positions: tokens that were generated before each.
    """

    def __init__(self, logits: Tensor, rows: list[SampleRow], positions: list[int]) -> None:
        self._rows, self._positions = rows, positions
        # Faster than argmax on CPUs, and also takes the first of equal logits.
        largest, best = logits.max(-1)
        self.token_ids = _choose(logits, best.int(), rows, positions)
        # The largest and smallest logit show any Inf or NaN of a row, without a copy of the row.
        finite = largest.isfinite() & logits.amin(-1).isfinite()
        chosen = torch.stack([self.token_ids, finite.int()])
        self._reported = [i for i, row in enumerate(rows) if row.logprobs is not None]
        scores: list[Tensor] = []
        if self._reported:
            at = _tensor(self._reported, torch.int64, logits)
            most = max(rows[i].logprobs or 0 for i in self._reported)
            reported = logits.index_select(0, at).float()
            scores = _scores(reported, self.token_ids.index_select(0, at), most)
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


def sample(logits: Tensor, rows: list[SampleRow], positions: list[int]) -> list[Sampled]:
    """Choose one token for each row of logits [R, V], and wait for the tokens."""
    return Sampling(logits, rows, positions).wait()


def fill_in(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Replace each `~i` in `token_ids` [T] by `sampled[i]`; both int32."""
    # Not `~token_ids`, which an NPU computes on its AI CPU.
    places = (-1 - token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, sampled.index_select(0, places), token_ids)


def _choose(logits: Tensor, best: Tensor, rows: list[SampleRow], positions: list[int]) -> Tensor:
    """The tokens of all rows, int32 [R]; the host does not wait for them.

    Args:
        best: index of each row's largest logit, the first of equal ones, int32 [R]; overwritten.
    """
    by_method: defaultdict[_Method, list[int]] = defaultdict(list)
    in_integers = DEVICES[logits.device.type].samples_in_integers
    for i, row in enumerate(rows):
        if row.temperature > 0:
            by_method[(_integer_draw if in_integers else _float_draw)(row)].append(i)
        elif _is_adjusted(row):
            by_method[_take_best].append(i)
    # Each row takes the cheapest path that its own parameters allow.
    for choose, numbers in by_method.items():
        at, chosen = _tensor(numbers, torch.int64, logits), [rows[i] for i in numbers]
        copied = logits.index_select(0, at).float()
        _adjust(copied, chosen)
        uniforms = [_uniform(rows[i].seed, positions[i]) for i in numbers if rows[i].temperature]
        best[at] = choose(copied, chosen, uniforms).int()
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
        or row.allowed is not None
        or row.seen_output
        or (row.repetition_penalty != 1 and row.seen_prompt)
    )


def _adjust(logits: Tensor, rows: list[SampleRow]) -> None:
    """Apply biases, penalties, bars, masks, in this order, to float32 logits [R, V], in place."""
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
    masks = {i: row.allowed for i, row in enumerate(rows) if row.allowed is not None}
    if len(masks) == len(rows):
        logits.masked_fill_(_forbidden(masks.values(), logits), -math.inf)
    elif masks:
        numbers = _tensor(list(masks), torch.int64, logits)
        forbidden = _forbidden(masks.values(), logits)
        logits[numbers] = logits[numbers].masked_fill(forbidden, -math.inf)


def _forbidden(masks: Collection[bytes], like: Tensor) -> Tensor:
    """Whether each token is not among a row's allowed ones, bool [R, V]."""
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    packed, bits = to_device([packed, bits], like.device)
    # No shifts, which an NPU does not have for bytes.
    is_off = (packed.view(len(masks), -1, 1) & bits) == 0
    return is_off.flatten(1)[:, : like.shape[-1]]


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


def _take_best(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """The best token of each row of float32 logits [R, V] → int64 [R]."""
    return logits.max(-1).indices


def _float_draw(row: SampleRow) -> _Method:
    return _draw_truncated if _is_truncated(row) else _draw


def _integer_draw(row: SampleRow) -> _Method:
    if not _is_truncated(row):
        return _draw_in_integers
    return _draw_of_best if 0 < row.top_k <= _MOST_BEST else _draw_of_sorted


def _draw(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """Draw from all tokens of each row of float32 logits [R, V], overwritten → int64 [R]."""
    cumulative = _probabilities(logits, rows).cumsum(-1, dtype=torch.float64)
    return _invert(cumulative, _uniforms(uniforms, logits) * cumulative[:, -1:])


def _is_truncated(row: SampleRow) -> bool:
    return row.top_p < 1 or row.min_p > 0 or row.top_k > 0


def _draw_truncated(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """Draw from the tokens that min_p and top_k leave, and then top_p, of each row of float32
    logits [R, V], overwritten → int64 [R]."""
    vocab_size = logits.shape[-1]
    # The host would have to wait for a device to know whether fewer candidates suffice.
    num_candidates = min(_FIRST_CANDIDATES, vocab_size) if on_host(logits) else vocab_size
    return _draw_from_best(
        num_candidates,
        _probabilities(logits, rows),
        _uniforms(uniforms, logits),
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


def _draw_of_best(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """`_draw_in_integers` from the tokens that top_k, at most 1024, and then min_p and top_p
    leave."""
    probabilities = _probabilities(logits, rows)
    count = min(max(row.top_k for row in rows), logits.shape[-1])
    best = probabilities.topk(count).values
    return _pick(_weights(_kept(probabilities, best, rows)), uniforms)


def _draw_of_sorted(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """`_draw_in_integers` from the tokens that min_p and top_k leave, and then top_p."""
    probabilities = _probabilities(logits, rows)
    ordered = probabilities.sort(dim=-1, descending=True).values
    return _pick(_weights(_kept(probabilities, ordered, rows)), uniforms)


def _draw_in_integers(logits: Tensor, rows: list[SampleRow], uniforms: list[float]) -> Tensor:
    """Draw from all tokens of each row of float32 logits [R, V], overwritten → int32 [R].

    No operation here falls to an NPU's AI CPU, as running sums of float64 and searches in sorted
    values would. A token of probability below 2⁻³¹ is never drawn; the probabilities of all tokens
    together are off by about 2⁻³⁰ · V at most.
    """
    return _pick(_weights(_probabilities(logits, rows)), uniforms)


def _kept(probabilities: Tensor, best: Tensor, rows: list[SampleRow]) -> Tensor:
    """The probabilities [R, V] of the tokens that each row keeps, summing to 1; 0 for others.

    Args:
        best: the largest probabilities of each row in descending order, as many as any row's top_k
            at least, or all of them: [R, C].
    """
    vocab_size, most = probabilities.shape[-1], best.shape[-1]
    # Integers below 2²⁴ are exact in float32.
    top_k, min_p, top_p, is_partial = _tensor(
        [
            [min(row.top_k, most) if row.top_k > 0 else most for row in rows],
            [row.min_p for row in rows],
            [row.top_p if row.top_p < 1 else 2.0 for row in rows],
            [0 < row.top_k < vocab_size or row.min_p > 0 for row in rows],
        ],
        torch.float32,
        best,
    )[..., None].unbind()
    places = torch.arange(most, dtype=torch.float32, device=best.device)
    left = (places < top_k) & (best > 0)
    if any(row.min_p > 0 for row in rows):
        left &= best >= best[:, :1] * min_p
    if any(row.top_p < 1 for row in rows):
        weights = _weights(best) * left
        sums = weights.cumsum(-1, dtype=torch.int32)
        # top_p applies to the mass that min_p and top_k leave; without them that is 1.
        whole = sums[:, -1:].float().masked_fill(is_partial == 0, _WHOLE_WEIGHT)
        # The mass before a token decides, so that the token that crosses top_p is kept.
        left &= (sums - weights).float() < top_p * whole
    num_kept = left.sum(-1, keepdim=True, dtype=torch.int32).clamp_(min=1)
    last = best.gather(-1, (num_kept - 1).long())
    # Among tokens as likely as the last one kept, those with the smallest ids are kept.
    num_above = (best > last).sum(-1, keepdim=True, dtype=torch.int32)
    is_equal = probabilities == last
    is_late = is_equal.int().cumsum(-1, dtype=torch.int32) > num_kept - num_above
    kept = probabilities.masked_fill((probabilities < last) | (is_equal & is_late), 0)
    return kept / kept.sum(-1, keepdim=True)


def _weights(probabilities: Tensor) -> Tensor:
    """Probabilities [R, V] as multiples of 2⁻³⁰, int32 [R, V]. Their sum fits into int32."""
    return (probabilities * _WHOLE_WEIGHT).round_().int()


def _pick(weights: Tensor, uniforms: list[float]) -> Tensor:
    """Draw an index of each row in proportion to its weights, int32 [R, V] → int32 [R].

    The weights of a row sum to about 2³⁰. The first 31 bits of its uniform number, modulo the sum,
    are the target: two numbers lead to each target, and one or three to a few, if the sum is off.
    """
    sums = weights.cumsum(-1, dtype=torch.int32)
    drawn = [int(uniform * (1 << 31)) for uniform in uniforms]
    targets = _tensor(drawn, torch.int32, weights)[:, None] % sums[:, -1:].clamp(min=1)
    # The first running sum above the target: a token of weight 0 is never picked. One exists unless
    # the probabilities are NaN.
    picked = (sums <= targets).sum(-1, dtype=torch.int32)
    return picked.clamp_(max=weights.shape[-1] - 1)


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


def _uniforms(uniforms: list[float], like: Tensor) -> Tensor:
    """The uniform number of each row, float64 [R, 1]."""
    return _tensor(uniforms, torch.float64, like)[:, None]


def _column(values: list[float], like: Tensor) -> Tensor:
    return _tensor(values, torch.float32, like)[:, None]


def _tensor(values: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
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
