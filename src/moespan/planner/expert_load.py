"""How many rows meet the busiest ep rank's experts in a step, and how many different ones.

A step waits for the rank with most to do, so means are too little. The choices of a router are
uniform, or drawn from counts that were recorded. Imports no torch.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
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
_POOL_TOKENS = 1 << 15


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
        self._pools: dict[int, npt.NDArray[np.int32]] = {}
        self._hits: dict[tuple[int, int], npt.NDArray[np.uint16]] = {}

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

    def mean(self, tokens: int, held: ExpertPlacement) -> ExpertLoad:
        """The mean load of a rank in one layer, if routing is uniform; by counts the load of the
        busiest rank, which is about the same one in all steps."""
        config = self._config
        if tokens <= 0 or not config.n_routed_experts or self._counts is not None:
            return self.busiest(tokens, held)
        most = max(len(experts) for experts in held.default)
        experts, chosen = config.n_routed_experts, config.num_experts_per_tok
        return uniform_maximum(tokens, experts, chosen, min(most, experts), 1)

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
            _drawn_maximum(tokens, self._hits_of(layer, tokens), held.of(layer))
            for layer in self._counts
        ]
        return ExpertLoad(*(float(np.mean(part)) for part in zip(*loads, strict=True)))

    def _hits_of(self, layer: int, tokens: int) -> npt.NDArray[np.uint16]:
        """Tokens of each expert, `[draws, experts]`, in draws of `tokens` tokens, at most 2048.

        All sizes and placements take the same tokens, so that their differences are no chance.
        """
        few = min(tokens, _MOST_DRAWN_TOKENS)
        if (layer, few) not in self._hits:
            counts = self.counts[layer]
            if layer not in self._pools:
                chosen = self._config.num_experts_per_tok
                self._pools[layer] = _pool(counts, chosen, self._seed + layer)
            draws = min(_DRAWS, _POOL_TOKENS // few)
            experts = self._pools[layer][: draws * few].reshape(draws, -1)
            cells = experts + np.arange(draws)[:, None] * len(counts)
            hits = np.bincount(cells.ravel(), minlength=draws * len(counts))
            self._hits[layer, few] = hits.reshape(draws, -1).astype(np.uint16)
        return self._hits[layer, few]


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


def _pool(counts: Sequence[int], chosen: int, seed: int) -> npt.NDArray[np.int32]:
    """The different experts that each of many tokens takes, `[tokens, chosen]`, with odds as
    `counts`: those with the first arrivals of an exponential race."""
    odds = np.maximum(np.asarray(counts, dtype=float), 1e-9)
    race = np.random.default_rng(seed).exponential(size=(_POOL_TOKENS, len(odds))) / odds
    return np.argpartition(race, chosen - 1, axis=1)[:, :chosen].astype(np.int32)


def _drawn_maximum(
    tokens: int, hits: npt.NDArray[np.uint16], held: tuple[tuple[int, ...], ...]
) -> ExpertLoad:
    """The mean load of the busiest rank over draws, scaled to `tokens`.

    Args:
        hits: tokens of each expert in each draw. Tokens take turns on copies of an expert.
    """
    copies = Counter(expert for own in held for expert in own)
    turns: Counter[int] = Counter()
    rows, met = (np.zeros((len(hits), len(held)), dtype=np.intp) for _ in range(2))
    for rank, own in enumerate(held):
        experts = list(own)
        number = np.array([copies[expert] for expert in experts])
        turn = np.array([turns[expert] for expert in experts])
        turns.update(experts)
        parts = (hits[:, experts] + number - 1 - turn) // number
        rows[:, rank], met[:, rank] = parts.sum(1), (parts > 0).sum(1)
    busiest = rows.argmax(1)
    draws = np.arange(len(hits))
    few = min(tokens, _MOST_DRAWN_TOKENS)
    return ExpertLoad(
        float(rows[draws, busiest].mean()) * tokens / few, float(met[draws, busiest].mean())
    )


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
