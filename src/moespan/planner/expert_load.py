"""How many rows meet the busiest ep rank's experts in a step, and how many different ones.

A step waits for the rank with most to do, so means are too little. The choices of a router are
uniform, or drawn from counts that were recorded. Imports no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moespan import files
from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import ModelConfig
from moespan.errors import ConfigError, shortened, shown

_Pmf = npt.NDArray[np.float64]

_MOST_EXACT_TOKENS = 4096
_DRAWS = 64
_MOST_DRAWN_TOKENS = 2048


class ExpertLoad(NamedTuple):
    """Load of the busiest ep rank in one layer.

    Attributes:
        rows: pairs of a token and an expert of the rank.
        met: different experts of the rank that they meet.
    """

    rows: float
    met: float


class Routing:
    """Which experts tokens choose.

    Args:
        counts: layer → how many tokens chose each expert; None is uniform routing.
        seed: of the draws from `counts`.
    """

    def __init__(
        self,
        config: ModelConfig,
        counts: dict[int, list[int]] | None = None,
        seed: int = 0,
        name: str = "uniform",
    ) -> None:
        self.name = name
        self._config, self._counts, self._seed = config, counts, seed
        self._loads: dict[object, ExpertLoad] = {}

    @property
    def counts(self) -> dict[int, list[int]]:
        """Layer → how many tokens chose each expert; empty if routing is uniform."""
        return self._counts or {}

    @classmethod
    def read(cls, how: str, config: ModelConfig, seed: int = 0) -> Routing:
        """`uniform`, or the path of a JSON file `{"counts": {"1": [n, n, ...], ...}}`, in which
        each layer with experts has a number of tokens for each of them.

        Raises:
            ConfigError: the file does not have this form, or does not fit the model.
        """
        if how == "uniform":
            return cls(config)
        if not Path(how).exists():
            raise ConfigError(f"routing {shown(how)} is neither uniform nor a file")
        return cls.of_file(how, config, seed)

    @classmethod
    def of_file(cls, path: str, config: ModelConfig, seed: int = 0) -> Routing:
        """The same, of a file only."""
        return cls(config, _read_counts(Path(path), config), seed, path)

    def busiest(self, tokens: int, held: ExpertPlacement) -> ExpertLoad:
        """The load of the busiest ep rank, the mean over all layers, if `tokens` meet experts.

        Uniform routing takes the tables of single layers for the default one.
        """
        if tokens <= 0 or not self._config.n_routed_experts:
            return ExpertLoad(0, 0)
        key = tokens, held.default, tuple(sorted(held.layers.items()))
        if key not in self._loads:
            self._loads[key] = self._busiest(tokens, held)
        return self._loads[key]

    def _busiest(self, tokens: int, held: ExpertPlacement) -> ExpertLoad:
        config = self._config
        if self._counts is None:
            sizes = tuple(len(experts) for experts in held.default)
            experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok
            if sum(sizes) > experts:  # copies share the tokens of their expert
                most = max(sizes)
                scale = sum(sizes) / experts
                load = uniform_maximum(tokens, experts, chosen, max(1, round(most / scale)), 1)
                return ExpertLoad(load.rows, load.met)
            return uniform_maximum(tokens, experts, chosen, max(sizes), len(sizes))
        loads = [
            _drawn_maximum(
                tokens, counts, config.num_experts_per_tok, held.of(layer), self._seed + layer
            )
            for layer, counts in self._counts.items()
        ]
        return ExpertLoad(*(float(np.mean(part)) for part in zip(*loads, strict=True)))


@functools.lru_cache(maxsize=1 << 14)
def uniform_maximum(
    tokens: int, experts: int, chosen: int, held: int, num_ranks: int
) -> ExpertLoad:
    """Expected largest load over `num_ranks` ranks that hold `held` of `experts` each, if each of
    `tokens` chooses `chosen` different experts, all choices being equally likely.

    The distributions of one rank are computed exactly (the rows as normal beyond 4096 tokens).
    Ranks are taken as independent, and the distance of the maximum from the mean is then stretched
    by sqrt(n / (n - 1)): the rows of all n ranks sum to a constant, so two of them have a
    correlation of -1 / (n - 1). Against draws this is at most 5 % off for one token and 2 % for
    more.
    """
    mean = tokens * chosen * held / experts
    share = 1 - (1 - chosen / experts) ** tokens
    if num_ranks == 1:
        return ExpertLoad(mean, held * share)
    stretch = math.sqrt(num_ranks / (num_ranks - 1))
    rows = mean + (_largest(_rows_pmf(tokens, experts, chosen, held), num_ranks) - mean) * stretch
    mean = held * share
    met = mean + (_largest(_met_pmf(tokens, experts, chosen, held), num_ranks) - mean) * stretch
    return ExpertLoad(min(rows, float(tokens * min(chosen, held))), min(met, float(held), rows))


def _largest(pmf: _Pmf, num: int) -> float:
    """Expected maximum of `num` independent numbers 0, 1, ... with probabilities `pmf`."""
    below = np.minimum(np.cumsum(pmf), 1.0)
    return float((1 - below**num).sum())


def _hypergeometric(experts: int, chosen: int, held: int) -> _Pmf:
    """Probability that 0, 1, ... of the `chosen` experts are among `held` given ones."""
    total = math.comb(experts, chosen)
    return np.array(
        [
            math.comb(held, k) * math.comb(experts - held, chosen - k) / total
            for k in range(min(chosen, held) + 1)
        ]
    )


def _rows_pmf(tokens: int, experts: int, chosen: int, held: int) -> _Pmf:
    one = _hypergeometric(experts, chosen, held)
    if tokens <= _MOST_EXACT_TOKENS:
        length = tokens * (len(one) - 1) + 1
        power = np.fft.irfft(np.fft.rfft(one, 2 * length) ** tokens, 2 * length)[:length]
        return np.clip(power, 0, None)
    values = np.arange(len(one))
    mean = tokens * float(one @ values)
    deviation = math.sqrt(tokens * (float(one @ values**2) - float(one @ values) ** 2))
    at = np.arange(int(mean + 8 * deviation) + 1)
    pmf = np.exp(-0.5 * ((at - mean) / deviation) ** 2)
    normal: _Pmf = pmf / pmf.sum()
    return normal


def _met_pmf(tokens: int, experts: int, chosen: int, held: int) -> _Pmf:
    """Distribution of the number of different ones met among `held` experts: a Markov chain, in
    which each token meets a hypergeometric number of those that nobody met before."""
    step = np.zeros((held + 1, held + 1))
    for met in range(held + 1):
        new = _hypergeometric(experts, chosen, held - met)
        step[met, met : met + len(new)] = new
    pmf: _Pmf = np.linalg.matrix_power(step, tokens)[0]
    return pmf


def _drawn_maximum(
    tokens: int, counts: Sequence[int], chosen: int, held: tuple[tuple[int, ...], ...], seed: int
) -> ExpertLoad:
    """The same, drawn: each token takes `chosen` different experts with odds as `counts`.

    A draw takes the largest keys of an exponential race. More tokens than 2048 are drawn as 2048
    and scaled. Tokens take turns on copies of an expert.
    """
    few = min(tokens, _MOST_DRAWN_TOKENS)
    random = np.random.default_rng((seed, few))
    odds = np.maximum(np.asarray(counts, dtype=float), 1e-9)
    copies = [[rank for rank, own in enumerate(held) if e in own] for e in range(len(odds))]
    draws = max(2, min(_DRAWS, (1 << 21) // (few * len(odds))))
    rows, met = [], []
    for _ in range(draws):
        race = random.exponential(size=(few, len(odds))) / odds
        taken = np.argpartition(race, chosen - 1, axis=1)[:, :chosen]
        hits = np.bincount(taken.ravel(), minlength=len(odds))
        of_rank, different = np.zeros(len(held)), np.zeros(len(held))
        for expert, ranks in enumerate(copies):
            for turn, rank in enumerate(ranks):
                part = (hits[expert] + len(ranks) - 1 - turn) // len(ranks)
                of_rank[rank] += part
                different[rank] += part > 0
        rows.append(of_rank.max())
        met.append(different[of_rank.argmax()])
    return ExpertLoad(float(np.mean(rows)) * tokens / few, float(np.mean(met)))


def write_counts(path: Path, counts: dict[int, list[int]]) -> None:
    """Write counts as `Routing.read` takes them."""
    shown = {str(layer): row for layer, row in counts.items()}
    text = msgspec.json.format(msgspec.json.encode({"counts": shown}), indent=0)
    files.write(path, text + b"\n")


def _read_counts(path: Path, config: ModelConfig) -> dict[int, list[int]]:
    def wrong(reason: str) -> ConfigError:
        return ConfigError(
            f"{path} is no file of expert counts: {reason}; generate --record-routing FILE writes "
            "one"
        )

    try:
        raw = files.read_json(path)
    except OSError as error:
        raise wrong(error.strerror or str(error)) from None
    except ValueError as error:
        raise wrong(f"it is not JSON: {shortened(error)}") from None
    try:
        raw = msgspec.convert(raw, dict[str, object])
        counts = msgspec.convert(raw.get("counts"), dict[int, list[int]], strict=False)
    except ValueError:
        raise wrong('it must be like {"counts": {"1": [3, 0, ...], ...}}') from None
    layers = {i for i in range(config.num_hidden_layers) if config.is_moe(i)}
    if set(counts) != layers:
        raise ConfigError(
            f"{path} has counts of the layers {shown(sorted(counts))}; the model has "
            f"experts in {shown(sorted(layers))}"
        )
    for layer, found in counts.items():
        if len(found) != config.n_routed_experts or min(found) < 0 or not any(found):
            raise ConfigError(
                f"{path}: layer {layer} needs {config.n_routed_experts} counts of at "
                "least 0, not all of them 0"
            )
    return counts
