"""A plan as one document: everything that was found, as plain values with a version.

JSON is this document; text (`report`), the HTML page and the picture are made of it, so that all of
them say the same.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from moespan.checkpoint.placement import count_parameters
from moespan.planner.cost import Line
from moespan.planner.memory import MachineMemory, RankMemory, memory_of_all
from moespan.planner.outcome import Outcome
from moespan.search.candidates import Candidate, Space
from moespan.search.capacity import Curve, capacity, capacity_of_all, curves
from moespan.search.commands import bench_command, engine_flags, start_commands
from moespan.search.explore import (
    Answer,
    Found,
    Question,
    cost_of,
    explore,
    prefill_step,
    relative_error,
    shares,
    simulated_one,
    typical_step,
    unmeasured,
)
from moespan.search.placing import proposed_placement
from moespan.version import __version__

VERSION = 1
"""Version of the document; a change that breaks its readers raises it."""

_MOST_COMMANDS = 64


def document(
    answer: Answer, model: str, *, nodes: Sequence[int] = (), explain: Answer | None = None
) -> dict[str, Any]:
    """Everything that a plan says.

    Args:
        model: the model's name, for commands.
        nodes: numbers of machines more or fewer for which to ask what if.
        explain: an answer whose first candidate is explained instead of the best ones.
    """
    question = answer.question
    shown = answer.shown if explain is None else explain.shown[:1]
    best = shown[0] if shown else None
    swept = curves(question, answer)
    return {
        "version": VERSION,
        "moespan": __version__,
        "hardware": _hardware(question, best),
        "model": _model(question, model),
        "load": _load(question),
        "targets": [str(target) for target in question.targets],
        "seed": question.seed,
        "searched": {
            "layouts": answer.num_layouts,
            "settings": answer.num_settings,
            "combinations": answer.num_combinations,
            "fitting": answer.num_fitting,
            "simulated": answer.num_simulated,
            "requests": question.num_requests,
            "is_estimate": question.fast,
        },
        "met": answer.met,
        "plans": [{"rank": rank, **_plan(answer, one, model)} for rank, one in enumerate(shown, 1)],
        "points": [point for i, curve in enumerate(swept) for point in _points(i, curve)],
        "small_messages": _worst(question, best),
        "placement": None if best is None else proposed_placement(question, best),
        "what_if": [_what_if(answer, best, change) for change in nodes],
        "advice": [] if answer.met else list(_advice(answer, swept)),
    }


def _hardware(question: Question, best: Found | None) -> dict[str, Any]:
    profile = question.profile
    per_node, devices = profile.devices_per_node, question.space.devices
    missing = [] if best is None else unmeasured(question, best)
    origins: dict[str, int] = {}
    for _, origin, _ in profile.leaves():
        origins[origin] = origins.get(origin, 0) + 1
    return {
        "name": profile.name,
        "title": profile.title or profile.name,
        "devices": devices,
        "devices_per_node": per_node,
        "nodes": -(-devices // per_node),
        "memory_bytes": profile.device.memory_bytes.value,
        "error": profile.relative_error if best is None else relative_error(question, best),
        "is_calibrated": profile.is_calibrated and not missing,
        "was_calibrated": profile.made is not None,
        "unmeasured": missing,
        "origins": origins,
        "figures": [list(leaf) for leaf in profile.leaves()],
    }


def _model(question: Question, name: str) -> dict[str, Any]:
    base = question.space.base
    total, active = count_parameters(question.model)
    return {
        "name": name,
        "parameters": total,
        "active_parameters": active,
        "dtype": base.dtype,
        "max_model_len": base.max_model_len,
        "kv_bytes_per_token": question.model.kv_bytes_per_token(base.cache_dtype),
        "routing": question.routing.name,
    }


def _load(question: Question) -> dict[str, Any]:
    load = question.load or question.sample
    name = load.name if question.load else f"{load.name}, as much as possible"
    return {
        "name": name,
        "rate": load.rate if question.load is not None else None,
        "concurrency": load.concurrency,
        "mean_prompt_tokens": load.mean_prompt_tokens,
        "mean_output_tokens": load.mean_output_tokens,
        "clipped": load.num_clipped,
        "goal": question.goal,
    }


def _plan(answer: Answer, one: Found, model: str) -> dict[str, Any]:
    """One candidate that is shown."""
    question, candidate = answer.question, one.candidate
    config, predicted = candidate.config, one.predicted
    assert predicted is not None
    cost = cost_of(question, candidate)
    decode = cost.lines(typical_step(question, one))
    prefill = cost.lines(prefill_step(question, one))
    commands = start_commands(candidate, model, question.profile)
    return {
        "engines": candidate.engines,
        "layout": config.layout.sizes,
        "layout_text": _layout_text(candidate),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "num_blocks": candidate.num_blocks,
        "block_size": config.block_size,
        "sequences_at_once": candidate.layout.dp * candidate.layout.pp * config.max_num_seqs,
        **_figures(one.outcome),
        "tokens_per_s": one.tokens_per_s,
        "tokens_per_s_per_device": one.tokens_per_device,
        "requests_per_s": candidate.engines * one.outcome.requests_per_s,
        "band": [
            {**_figures(edge.outcome), "was_given_up": edge.outcome.is_cut}
            for edge in (one.fast, one.slow)
            if edge is not None
        ],
        "is_estimate": predicted.is_estimate,
        "concurrency": predicted.concurrency,
        "preemptions": predicted.num_preemptions,
        "prefix_hits": predicted.hit_share,
        "was_given_up": one.outcome.is_cut,
        "at_risk": one.at_risk(question.targets),
        "misses": [
            {"target": str(target), "value_s": value.value, "by": target.missed_by(one.outcome)}
            for target in question.targets
            for value in [target.of(one.outcome)]
            if value is not None and target.missed_by(one.outcome) > 0
        ],
        "error": relative_error(question, one),
        "too_close": answer.too_close(one),
        "memory": _memory(candidate.memory, question.profile.device.memory_bytes.value),
        "classes": _classes(question, candidate),
        "limits": shares(decode),
        "decode_step": [msgspec.to_builtins(line) for line in decode],
        "prefill_step": [msgspec.to_builtins(line) for line in prefill],
        "num_sums": _num_sums(decode),
        "flags": shlex.join(engine_flags(candidate)),
        "bench": bench_command(candidate, model, _load_flags(question, one)),
        "commands": [str(command) for command in commands[:_MOST_COMMANDS]],
        "num_commands": len(commands),
        "command_nodes": [command.node for command in commands[:_MOST_COMMANDS]],
    }


def _load_flags(question: Question, one: Found) -> list[str]:
    """The load of one engine, as `bench` takes it."""
    load, engines = question.load, one.candidate.engines
    if question.trace is not None:
        found = ["--load", question.trace]
    else:
        found = ["--input", question.lengths[0], "--output", question.lengths[1]]
    if (load or question.sample).num_clipped:
        found.append("--clip")
    rate = load.rate if load is not None else None
    if load is not None and rate is not None and load.poisson_rate is None:
        # The arrivals of the trace itself: the very part that was simulated.
        found += [] if question.speed == 1 else ["--speed", f"{question.speed:g}"]
        found += [] if engines == 1 else ["--share", str(engines)]
        return [*found, *([] if question.seed == 0 else ["--seed", str(question.seed)])]
    if rate is not None and math.isfinite(rate):
        return [*found, "--rate", f"{rate / engines:.6g}"]
    assert one.predicted is not None
    concurrency = one.predicted.concurrency or round(
        one.estimate.sequences * one.candidate.layout.dp
    )
    return [*found, "--concurrency", str(max(concurrency, 1))]


def _classes(question: Question, candidate: Candidate) -> list[dict[str, Any]]:
    """Bytes of each part on every class of ranks that are alike; replicas are."""
    config = replace(candidate.config, layout=candidate.layout.with_fewest_replicas)
    machine = MachineMemory.of(config.device, question.profile.device)
    memory_bytes = question.profile.device.memory_bytes.value
    return [
        {
            "stage": one.one.rank // config.layout.stage_size,
            "ranks": one.one.num_ranks * candidate.layout.dp // config.layout.dp,
            **_memory(one.with_blocks(candidate.num_blocks), memory_bytes),
        }
        for one in question.memories.get(config) or memory_of_all(config, question.model, machine)
    ]


def _memory(memory: RankMemory, memory_bytes: float) -> dict[str, Any]:
    """Bytes of each part."""
    parts = msgspec.to_builtins(memory)
    del parts["touched_bytes"]
    taken = memory.total_bytes
    return {**parts, "taken_bytes": taken, "free_bytes": memory_bytes - taken}


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "ttft_s": msgspec.to_builtins(outcome.ttft_s),
        "tpot_s": msgspec.to_builtins(outcome.tpot_s),
    }


def _layout_text(candidate: Candidate) -> str:
    return str(candidate.layout).replace("×", " ")


def _num_sums(lines: Sequence[Line]) -> int:
    return sum(line.count for line in lines if line.kind == "collective")


def _points(number: int, curve: Curve) -> Iterator[dict[str, Any]]:
    """A candidate in the picture of the front, with ever more sequences; by mean values."""
    for one in curve.estimates:
        yield {
            "curve": number,
            "label": f"{curve.candidate}, {one.sequences:.0f} sequences in a replica",
            "ttft_s": one.ttft_s,
            "tpot_s": one.tpot_s,
            "tokens_per_s_per_device": one.tokens_per_s / curve.candidate.layout.world_size,
        }


def _worst(question: Question, best: Found | None) -> dict[str, Any] | None:
    """The best candidate if small messages take as long as their upper bounds; None where the
    profile has none, or the answer is the same."""
    levels = question.profile.levels
    if question.worst or best is None or not any(level.worst_latency_us for level in levels):
        return None
    space = _narrow(question, best)
    other = explore(replace(question, space=space, worst=True, fast=True, smallest=True))
    if not other.found:
        return None
    first = other.found[0]
    usual = {ranks: figure.value for level in levels for ranks, figure in level.latency_us.items()}
    worst = {r: figure.value for level in levels for r, figure in level.worst_latency_us.items()}
    return {
        "usual_us": usual,
        "worst_us": worst,
        "engines": first.candidate.engines,
        "layout_text": _layout_text(first.candidate),
        "is_same": first.candidate.layout == best.candidate.layout
        and first.candidate.engines == best.candidate.engines,
        "tpot_s": first.estimate.tpot_s,
        "ttft_s": first.estimate.ttft_s,
    }


def _narrow(question: Question, best: Found) -> Space:
    """The space with the best candidate's settings only, but as many sequences as any."""
    config = best.candidate.config
    most = max(
        seqs for seqs in question.space.max_num_seqs if seqs <= config.max_num_batched_tokens
    )
    return replace(
        question.space,
        quantizations=(config.quantization,),
        kv_cache_dtypes=(config.kv_cache_dtype,),
        max_num_seqs=(most,),
        max_num_batched_tokens=(config.max_num_batched_tokens,),
    )


def _what_if(answer: Answer, best: Found | None, change: int) -> dict[str, Any] | None:
    """The best candidate with `change` nodes more, in the settings of `best`; None if there are no
    such machines, or the profile joins fewer devices, as that of a calibrated node does."""
    question, profile = answer.question, answer.question.profile
    space = question.space if best is None else _narrow(question, best)
    nodes = -(-space.devices // profile.devices_per_node)
    devices = space.devices + change * profile.devices_per_node
    joined = profile.levels[-1].devices if profile.levels else 1
    if devices < 1 or (joined is not None and devices > joined):
        return None
    is_whole = space.devices % profile.devices_per_node == 0
    told = {
        "nodes": nodes + change,
        "devices": devices,
        "change": f"{nodes} → {nodes + change} nodes"
        if is_whole
        else f"{space.devices} → {devices} devices",
    }
    other = replace(question, space=replace(space, devices=devices), fast=True, smallest=True)
    question.tell(f"what if {told['change']}")
    found = explore(other)
    if not found.found:
        return {**told, "fits": False}
    first = found.found[0] if question.fast else simulated_one(other, found.found[0])
    before = capacity_of_all(replace(question, space=space), answer)
    after = capacity_of_all(other, found)
    return {
        **told,
        "fits": True,
        "engines": first.candidate.engines,
        "layout_text": _layout_text(first.candidate),
        **_figures(first.outcome),
        "tokens_per_s": first.tokens_per_s,
        "meets": first.excess(question.targets) <= 0,
        "misses": [
            {"target": str(target), "by": target.missed_by(first.outcome)}
            for target in question.targets
            if target.missed_by(first.outcome) > 0
        ],
        "requests_ratio": after / before if before else None,
    }


def _advice(answer: Answer, swept: Sequence[Curve]) -> Iterator[str]:
    """The changes that would meet the targets that no candidate meets, by mean values."""
    question = answer.question
    profile, space = question.profile, question.space
    if answer.found:
        space = _narrow(question, answer.found[0])
    rate = question.load.rate if question.load is not None else None
    possible = capacity(question, [curve.candidate for curve in swept])
    if rate and possible and possible < rate:
        yield f"fewer requests: about {_rate(possible)} a second instead of {_rate(rate)}"
    nodes = -(-space.devices // profile.devices_per_node)
    for times in (2, 3, 4, 8):
        more = replace(space, devices=space.devices * times)
        if _would_meet(replace(question, space=more)):
            yield f"more devices: {more.devices} ({nodes * times} nodes)"
            break
    for quantization in ("int8", "w8a8"):
        if quantization not in space.quantizations:
            tried = replace(space, quantizations=(quantization,))
            if _would_meet(replace(question, space=tried)):
                yield f"a quantization: --quantization {quantization}"
    best = answer.found[0] if answer.found else None
    if best is not None and possible and question.load is not None and rate is None:
        demand = question.demand(best.candidate.engines)
        yield f"fewer requests at a time than {demand.concurrency or 0} an engine"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _would_meet(question: Question) -> bool:
    found = explore(replace(question, fast=True, smallest=True))
    return any(one.estimate.excess(question.targets) <= 0 for one in found.found)
