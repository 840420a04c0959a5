"""Compares the engine with reference logits, position by position.

A reference is a safetensors file. For each prompt i = 0, 1, ... it holds `p<i>.ids` int64 [T] and
`p<i>.logits` [T, V]. It may hold `p<i>.greedy` int64 [N], the greedy continuation, which EOS does
not end. A reference from a stranger is safe to read: safetensors holds no code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moespan.checkpoint.writer import naming
from moespan.config import SCHEMES, Layout, ModelConfig
from moespan.engine.request import Request, SamplingParams
from moespan.errors import ConfigError, RequestError, shortened, shown
from moespan.files import open_regular
from moespan.front.llm import LLM

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """Limits within which outputs count as equal.

    Attributes:
        relative: largest allowed |Δlogit|, as a share of the reference's largest |logit|.
        kl: largest allowed mean Kullback-Leibler divergence from the reference, in nats; None for
            no limit.
        top1: smallest allowed share of positions with the same most probable token; None for no
            limit.
        greedy: whether the greedy continuation must be identical.
    """

    relative: float
    kl: float | None
    top1: float | None
    greedy: bool


_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_ROUNDINGS_PER_LAYER = 8
_PRODUCTS_PER_LAYER = 4
# Largest element of a row, as a multiple of the standard deviation of the row.
_CREST = 4
# The same for a group of 32 normally distributed neighbours: the root mean square over groups.
_GROUP_CREST = 2.3
# Variance of the relative error of rounding. The step of an integer depends on the largest element
# of its row or group, the step of a float on the float itself.
_VARIANCE = {
    "int8": (_CREST / 127) ** 2 / 12,
    "float8_e4m3fn": 2.0**-8 / 3,
    "int4": (_GROUP_CREST / 8) ** 2 / 12,
}


@dataclass(frozen=True)
class Rounding:
    """Tensors that the verified engine rounds to 8 or 4 bits and the reference does not.

    Activations and KV cache count even if the reference rounds them too. They depend slightly on
    the order of operations, and rounding can turn such a small difference into a whole step.

    Attributes:
        weights, activations, kv_cache: dtype to which these tensors are rounded; None if they do
            not count.
    """

    weights: str | None = None
    activations: str | None = None
    kv_cache: str | None = None

    @classmethod
    def of(cls, llm: LLM, reference: Reference) -> Rounding:
        """Tensors that `llm` rounds and `reference` does not."""
        ours, theirs = (
            SCHEMES.get(name or "") for name in (llm.info.quantization, reference.quantization)
        )
        are_same = ours and theirs and ours.dtype == theirs.dtype
        return cls(
            weights=ours.dtype if ours and not are_same else None,
            activations=ours.dtype if ours and ours.activation_bits == 8 else None,
            kv_cache="int8" if llm.info.cache_dtype == "int8" else None,
        )

    @property
    def variance(self) -> float:
        """Variance of the relative error that rounding adds to the result of a product."""
        kinds = (self.weights, self.activations, self.kv_cache)
        return sum(_VARIANCE[kind] for kind in kinds if kind is not None)


def tolerance(
    dtype: str, config: ModelConfig, logit_std: float, rounding: Rounding | None = None
) -> Tolerance:
    """The tolerance for `dtype`.

    float32 is a contract: 2e-4 of the largest logit, and the same greedy tokens. For 16-bit dtypes
    the tolerance follows from two sources of error; docs/verification.md derives it:

    - Rounding of the residual stream, 8 times in each of L layers. Each error is uniform within the
      unit roundoff u. Together they are a relative error of sigma = u·√(8·L/3).
    - Swapped experts. Where the probabilities of two experts differ by less than u, rounding may
      swap them. This happens to a share u of tokens per MoE layer and direction, 2·M·u in all. It
      changes a token's output by about the weight of one of the k chosen experts, 1/k.

    Rounding to 8 or 4 bits adds to both sources. Each kind of tensor that is rounded adds a
    relative error e to the result of each of the four products of a layer:

    - 8-bit integers: the largest element of a row is c = 4 standard deviations, and a step is c/127
      of a deviation, so e = c/(127·√12).
    - 8-bit floats: three bits follow the leading one, so a float is rounded within 2⁻⁴ of itself,
      e = 2⁻⁴/√3.
    - 4-bit integers: the largest element of a group is c = 2.3 standard deviations, and a step is
      c/8 of a deviation, so e = c/(8·√12).

    Then sigma² grows by 4·L·Σe², and experts may swap where they differ by less than u + √Σe². An
    error of relative variance v in logits of standard deviation s costs s²·v/2 nats.

    Args:
        logit_std: standard deviation of the reference's logits over the vocabulary.
        rounding: tensors that are rounded, but not in the reference; None for no such tensors.
    """
    rounding_variance = (rounding or Rounding()).variance
    if dtype == "float32" and not rounding_variance:
        return Tolerance(relative=2e-4, kl=None, top1=None, greedy=True)
    u = _UNIT_ROUNDOFF.get(dtype, 0.0)
    layers = config.num_hidden_layers
    sigma = math.sqrt(
        u**2 * _ROUNDINGS_PER_LAYER * layers / 3 + rounding_variance * _PRODUCTS_PER_LAYER * layers
    )
    swap = 1 / config.num_experts_per_tok if config.num_moe_layers else 0.0
    swap_margin = u + math.sqrt(rounding_variance)
    variance = sigma**2 + 2 * config.num_moe_layers * swap_margin * swap**2
    kl = logit_std**2 * variance / 2
    return Tolerance(
        relative=6 * sigma + swap, kl=kl, top1=1 - 2 * math.sqrt(variance), greedy=False
    )


@dataclass(frozen=True)
class PromptReport:
    """Differences of one prompt from the reference.

    Attributes:
        max_abs_diff: largest |Δlogit| over all positions.
        max_abs_logit: largest |logit| of the reference.
        mean_kl, max_kl: KL(reference ‖ ours), in nats, over the positions.
        top1: share of positions with the same most probable token.
        first_divergence: first position whose most probable token differs; None if all agree.
        greedy_equal: whether the greedy continuation is the same; None if the reference has none.
        first_greedy_divergence: first generated token that differs; None if all agree.
    """

    name: str
    num_tokens: int
    max_abs_diff: float
    max_abs_logit: float
    mean_kl: float
    max_kl: float
    top1: float
    first_divergence: int | None
    greedy_equal: bool | None
    first_greedy_divergence: int | None


@dataclass(frozen=True)
class VerifyReport:
    """Differences of all prompts from the reference, and the rules that they break.

    Attributes:
        dtype, quantization, cache_dtype, layout: those of the engine that was verified.
    """

    dtype: str
    quantization: str | None
    cache_dtype: str
    layout: Layout
    tolerance: Tolerance
    prompts: list[PromptReport]

    @property
    def max_abs_diff(self) -> float:
        """Largest |Δlogit|; NaN if any prompt has a NaN (Python's `max` might ignore it)."""
        return float(np.max([prompt.max_abs_diff for prompt in self.prompts]))

    @property
    def max_relative_diff(self) -> float:
        """Largest |Δlogit| as a share of the largest |logit| of the whole reference."""
        scale = max(prompt.max_abs_logit for prompt in self.prompts)
        return self.max_abs_diff / scale if scale else self.max_abs_diff

    @property
    def mean_kl(self) -> float:
        """Mean divergence over all positions, in nats."""
        return self._mean("mean_kl")

    @property
    def max_kl(self) -> float:
        """Largest divergence at any position, in nats; NaN if any position has a NaN."""
        return float(np.max([prompt.max_kl for prompt in self.prompts]))

    @property
    def top1(self) -> float:
        """Share of all positions with the same most probable token."""
        return self._mean("top1")

    @property
    def failures(self) -> list[str]:
        """One message for each broken rule of the tolerance; empty if all rules hold."""
        limit = self.tolerance
        found = []
        # Negated comparisons, so that a NaN breaks the rule.
        if not self.max_relative_diff <= limit.relative:
            found.append(
                f"max |Δ| is {self.max_relative_diff:.2e} of the largest logit, "
                f"over {limit.relative:.0e}"
            )
        if limit.kl is not None and not self.mean_kl <= limit.kl:
            found.append(f"mean KL is {self.mean_kl:.2e} nats, over {limit.kl:.0e}")
        if limit.top1 is not None and not self.top1 >= limit.top1:
            found.append(f"top-1 agreement is {self.top1:.2%}, under {limit.top1:.0%}")
        if limit.greedy:
            found += [
                f"{prompt.name}: greedy token {prompt.first_greedy_divergence} differs"
                for prompt in self.prompts
                if prompt.greedy_equal is False
            ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON; None replaces NaN, which JSON lacks."""
        report = {
            "passed": not self.failures,
            "failures": self.failures,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kv_cache_dtype": self.cache_dtype,
            "layout": self.layout.sizes,
            "max_abs_diff": self.max_abs_diff,
            "max_relative_diff": self.max_relative_diff,
            "mean_kl": self.mean_kl,
            "max_kl": self.max_kl,
            "top1": self.top1,
            "tolerance": asdict(self.tolerance),
            "prompts": [asdict(prompt) for prompt in self.prompts],
        }
        plain: dict[str, Any] = json.loads(json.dumps(report), parse_constant=lambda _: None)
        return plain

    def _mean(self, name: str) -> float:
        weights = [prompt.num_tokens for prompt in self.prompts]
        return float(np.average([getattr(p, name) for p in self.prompts], weights=weights))


# Number of dimensions and allowed dtypes of the tensors of a reference file.
_FORM = {
    "ids": (1, ("I64", "I32")),
    "logits": (2, ("F64", "F32", "F16")),
    "greedy": (1, ("I64", "I32")),
}


_PROMPT = re.compile(r"p[0-9]{1,9}\.ids")


class Reference:
    """An open reference file.

    Attributes:
        prompts: names p0, p1, ... of its prompts, in the order of their numbers.
        quantization: scheme of the model that wrote the file; None if the file names none.

    Raises:
        ConfigError: the file cannot be read, is malformed, or holds no prompt.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            with open_regular(path) as opened:
                self._file = safe_open(f"/proc/self/fd/{opened.fileno()}", framework="numpy")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"reference {path} cannot be read: {shortened(error, 200)}") from None
        self._keys = set(self._file.keys())
        self.quantization = (self._file.metadata() or {}).get("quantization")
        self.prompts = sorted(
            (key.removesuffix(".ids") for key in self._keys if _PROMPT.fullmatch(key)),
            key=lambda name: int(name[1:]),
        )
        for key in sorted(self._keys):
            self._check(path, key)
        missing = [name for name in self.prompts if f"{name}.logits" not in self._keys]
        if not self.prompts or missing:
            raise ConfigError(
                f"reference {path} has "
                + (f"no {missing[0]}.logits" if missing else "no prompt p0.ids")
                + "; write one with --write-reference"
            )

    def _check(self, path: str | Path, key: str) -> None:
        """Raise `ConfigError` if `ids`, `logits` or `greedy` could not read the tensor `key`."""
        num_dims, dtypes = _FORM.get(key.rpartition(".")[2], (None, ()))
        part = self._file.get_slice(key)
        shape, dtype = part.get_shape(), part.get_dtype()
        if num_dims is not None and (len(shape) != num_dims or dtype not in dtypes):
            raise ConfigError(
                f"reference {path}: {shortened(key)} is {dtype} of shape {shown(shape)}; it must "
                f"have {num_dims} dimension{'s' * (num_dims > 1)} of {' or '.join(dtypes)}"
            )

    def ids(self, name: str) -> list[int]:
        """Token ids of the prompt `name`."""
        return [int(token) for token in self._file.get_tensor(f"{name}.ids")]

    def logits(self, name: str) -> Floats:
        """Logits of the prompt `name`, float32 [T, V]."""
        logits: Floats = self._file.get_tensor(f"{name}.logits").astype(np.float32)
        return logits

    def get(self, key: str) -> Floats | None:
        """The tensor `key` of the file in float32; None if the file has no such tensor."""
        if key not in self._keys:
            return None
        values: Floats = self._file.get_tensor(key).astype(np.float32)
        return values

    def greedy(self, name: str) -> list[int] | None:
        """Greedy continuation of the prompt `name`; None if the file has none."""
        key = f"{name}.greedy"
        return [int(t) for t in self._file.get_tensor(key)] if key in self._keys else None


# Infinities become NaN, which breaks every rule of the tolerance. NumPy need not warn of them.
@np.errstate(invalid="ignore")
def verify(llm: LLM, reference: Reference) -> VerifyReport:
    """Compare `llm` with `reference` at every position.

    Raises:
        RequestError: a prompt of the reference does not fit the model.
    """
    prompts = {name: reference.ids(name) for name in reference.prompts}
    lengths = {name: len(reference.greedy(name) or ()) for name in prompts}
    reports = {}
    for name, logits, greedy in _compute(llm, prompts, lengths):
        reports[name] = _compare(
            name, logits, reference.logits(name), greedy, reference.greedy(name)
        )
    logit_std = float(np.mean([reference.logits(name).std(-1).mean() for name in prompts]))
    return VerifyReport(
        llm.config.dtype,
        llm.info.quantization,
        llm.info.cache_dtype,
        llm.config.layout,
        tolerance(llm.config.dtype, llm.model_config, logit_std, Rounding.of(llm, reference)),
        [reports[name] for name in prompts],
    )


def write_reference(
    llm: LLM, path: Path, prompts: Iterable[list[int]], num_greedy_tokens: int
) -> None:
    """Write a reference file from the results of `llm`, best of one rank in float32.

    Raises:
        RequestError: a prompt does not fit the model.
    """
    named = {f"p{i}": ids for i, ids in enumerate(prompts)}
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, logits, greedy in _compute(llm, named, dict.fromkeys(named, num_greedy_tokens)):
        tensors[f"{name}.ids"] = np.array(named[name], dtype=np.int64)
        tensors[f"{name}.logits"] = logits
        tensors[f"{name}.greedy"] = np.array(greedy, dtype=np.int64)
    metadata = {"made_by": "moespan", "dtype": llm.config.dtype}
    if llm.info.quantization is not None:
        metadata["quantization"] = llm.info.quantization
    with naming(path):
        save_file(tensors, str(path), metadata=metadata)


def _compute(
    llm: LLM, prompts: dict[str, list[int]], num_greedy_tokens: dict[str, int]
) -> Iterator[tuple[str, Floats, list[int]]]:
    """Name, logits [T, V] and greedy continuation of each prompt, as prompts finish."""
    names: dict[str, str] = {}

    def requests() -> Iterator[tuple[None, Request]]:
        for name, ids in prompts.items():
            params = SamplingParams(
                temperature=0, max_tokens=max(num_greedy_tokens[name], 1), ignore_eos=True
            )
            try:
                _, request = llm.request(ids, params, prompt_logits=True)
            except RequestError as error:
                raise RequestError(f"{name}: {error}") from None
            names[request.id] = name
            yield None, request

    for output in llm.stream(requests()):
        name = names[output.request_id]
        if output.error is not None:
            raise RequestError(f"{name}: {output.error}")
        logits = np.frombuffer(output.prompt_logits, dtype=np.float32)
        greedy = output.outputs[0].token_ids[: num_greedy_tokens[name]]
        yield name, logits.reshape(len(prompts[name]), -1), greedy


def _compare(
    name: str, ours: Floats, theirs: Floats, greedy: list[int], expected: list[int] | None
) -> PromptReport:
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"reference {name}.logits has shape {list(theirs.shape)}, and the model gives "
            f"{list(ours.shape)}; use a reference of this model"
        )
    same = ours.argmax(-1) == theirs.argmax(-1)
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    divergences = np.flatnonzero(~same)
    greedy_differences = (
        [i for i, (a, b) in enumerate(zip(greedy, expected, strict=False)) if a != b]
        if expected is not None
        else []
    )
    if expected is not None and not greedy_differences and len(greedy) < len(expected):
        greedy_differences = [len(greedy)]
    return PromptReport(
        name=name,
        num_tokens=len(ours),
        max_abs_diff=float(np.abs(ours - theirs).max()),
        max_abs_logit=float(np.abs(theirs).max()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top1=float(same.mean()),
        first_divergence=int(divergences[0]) if len(divergences) else None,
        greedy_equal=None if expected is None else not greedy_differences,
        first_greedy_divergence=greedy_differences[0] if greedy_differences else None,
    )


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
