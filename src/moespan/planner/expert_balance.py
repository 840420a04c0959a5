"""Which ep rank should hold which experts, from counts of their tokens.

Greedy packing gives the next busiest expert to the rank with the fewest rows so far. A local search
then exchanges experts of the busiest rank. Both keep the number of experts of each rank. Imports no
torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from moespan.parallel.tokens import split_evenly

Table = tuple[tuple[int, ...], ...]
"""For each ep rank, the experts that it holds."""


def rank_rows(counts: Sequence[int], table: Table) -> list[float]:
    """Rows of each ep rank: pairs of a token and one of its experts. Copies share them evenly."""
    copies = Counter(expert for held in table for expert in held)
    return [sum(counts[expert] / copies[expert] for expert in held) for held in table]


def balanced(counts: Sequence[int], ep: int, copies: int = 0) -> Table:
    """A table under which the busiest rank has few rows, never more than under `contiguous`.

    Args:
        counts: tokens that chose each expert.
        copies: experts that each rank holds beyond its share: copies of busy ones.
    """
    sizes = split_evenly(len(counts), ep)
    starts = [sum(sizes[:rank]) for rank in range(ep)]
    contiguous = [list(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)]
    packed = _pack(counts, _num_copies(counts, ep, copies), [size + copies for size in sizes])
    found = [_search(counts, one) for one in (packed, contiguous)]
    return min(found, key=lambda table: max(rank_rows(counts, table)))


def balanced_layers(
    counts: Mapping[int, Sequence[int]], ep: int, copies: int = 0
) -> dict[str, list[list[int]]]:
    """`balanced` for each layer of `counts`, in the form of `--expert-placement`."""
    return {
        str(layer): [list(held) for held in balanced(row, ep, copies)]
        for layer, row in counts.items()
    }


def _num_copies(counts: Sequence[int], ep: int, copies: int) -> list[int]:
    """Ranks that hold each expert: further copies go to the one with the most rows a copy."""
    number = [1] * len(counts)
    for _ in range(copies * ep):
        free = [expert for expert, held in enumerate(number) if held < ep]
        if free:
            number[max(free, key=lambda expert: counts[expert] / number[expert])] += 1
    return number


def _pack(counts: Sequence[int], number: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Experts with copies come first, as no rank takes one twice. A copy without a place is left
    out."""
    shares = [count / held for count, held in zip(counts, number, strict=True)]
    order = sorted(range(len(counts)), key=lambda e: (number[e] == 1, -shares[e]))
    table: list[list[int]] = [[] for _ in sizes]
    loads = [0.0] * len(sizes)
    for expert in order:
        for _ in range(number[expert]):
            ranks = [
                rank
                for rank, size in enumerate(sizes)
                if len(table[rank]) < size and expert not in table[rank]
            ]
            if ranks:
                rank = min(ranks, key=loads.__getitem__)
                table[rank].append(expert)
                loads[rank] += shares[expert]
    return table


def _search(counts: Sequence[int], table: list[list[int]]) -> Table:
    """Exchange two experts as long as that takes rows from the busiest rank."""
    table = [list(held) for held in table]
    while (best := min(_exchanges(counts, table), default=None)) is not None:
        _, busiest, given, other, taken = best
        table[busiest][table[busiest].index(given)] = taken
        table[other][table[other].index(taken)] = given
    return tuple(tuple(sorted(held)) for held in table)


def _exchanges(
    counts: Sequence[int], table: list[list[int]]
) -> Iterator[tuple[float, int, int, int, int]]:
    """Larger load of the two ranks afterwards, the busiest rank and the expert that it gives, the
    other rank and its expert; only exchanges that help."""
    number = Counter(expert for held in table for expert in held)
    loads = rank_rows(counts, tuple(map(tuple, table)))
    busiest = max(range(len(table)), key=loads.__getitem__)
    for other, held in enumerate(table):
        for given in set(table[busiest]) - set(held):
            for taken in set(held) - set(table[busiest]):
                moved = counts[given] / number[given] - counts[taken] / number[taken]
                after = max(loads[busiest] - moved, loads[other] + moved)
                if after < loads[busiest] * (1 - 1e-9):
                    yield after, busiest, given, other, taken
