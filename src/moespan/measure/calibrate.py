"""Measures a machine, and writes the profile that `moespan plan` computes with.

Operations run on random weights in the shapes that the ranks of many layouts hold, so that one
device calibrates the computing of all layouts. Collectives run on real ranks. The host's terms are
those of the real engine without its network. What is found is saved after every part, so that an
interrupted calibration keeps what it has.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from moespan import files
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig, Nodes
from moespan.device import DEVICES
from moespan.errors import LayoutError, MoespanError
from moespan.measure import collectives, overhead
from moespan.measure.operations import (
    CLOCKS,
    Operations,
    Sweep,
    Times,
    in_graph,
    synchronizer,
    timed,
)
from moespan.measure.probe import Probe, last_level_cache_bytes, machine_name
from moespan.memory import allocated_bytes, available_bytes, is_host
from moespan.ops import Ops, ops_for
from moespan.parallel.counters import sent_bytes
from moespan.planner.profile import (
    SCHEMA,
    Broadcast,
    Collective,
    DeviceFigures,
    Figure,
    Launch,
    Level,
    Made,
    Operation,
    Profile,
    save,
)
from moespan.planner.work import RankWork, Task
from moespan.version import __version__

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_TENSOR_SIZES = (1, 2, 4, 8, 16)
_MESSAGES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_PLANS = (256, 4 << 10, 16 << 10, 64 << 10, 256 << 10)
_CONTEXTS = (128, 1024, 4096)
_BATCHES = (1, 64)
# A curve ends where one call takes longer.
_LONGEST_CALL_S = 1.0
_LEAST_TURN_BYTES = 128 << 20
# Caches larger than this belong to many cores, of which a rank has a part.
_MOST_SWEPT_BYTES = 64 << 20
# Layers of the small networks whose own Python is measured.
_FEW_LAYERS, _MANY_LAYERS = 2, 6
# Calls of an operation after a sweep, at most.
_SWEPT_CALLS = 9


class _OutOfTimeError(Exception):
    """The time for operations is over."""


@dataclass
class Calibration:
    """One machine's measurements.

    Args:
        config: device, dtype, quantization, dtype of the cache, limits of a step; its layout comes
            first, and gives the ranks for collectives.
        out: file that is written after every part.
        seconds: when the last operation begins, at the latest, by the clock.
        clock: `wall`, or `cpu` for CPU time of one thread.
        folder: checkpoint with a tokenizer, for the host's cost of text; None does without text.
        nodes: the machines that share the ranks of the config's layout; each has its own
            calibration, of which those of other nodes than node 0 only `assist`.
        layouts: whose shapes are measured beside the config's own; None: those of tp, ep and dp
            from 1 to 16.
    """

    config: EngineConfig
    model: ModelConfig
    out: Path
    seconds: float = 180.0
    clock: str = "wall"
    folder: Path | None = None
    command: str = ""
    say: Callable[[str], object] = lambda text: None
    nodes: Nodes = field(default_factory=Nodes)
    layouts: Sequence[Layout] | None = None
    _started: float = field(default_factory=time.monotonic)
    _began: float = 0.0

    def run(self) -> Profile:
        """Measure all parts; Ctrl-C ends it, and what was measured by then is kept."""
        self._device = torch.device(self.config.device)
        self._began = CLOCKS[self.clock].now()
        if CLOCKS[self.clock].one_thread:
            torch.set_num_threads(1)
        self._was_there = self.out.exists()
        self._sweep: Sweep | None = None
        if is_host(self._device):
            swept = min(last_level_cache_bytes(), _MOST_SWEPT_BYTES)
            self._sweep = Sweep(swept, self.clock)
        self.profile = self._first()
        parts = [self._measure_host, self._measure_collectives, self._measure_operations]
        if self.nodes.nnodes > 1:  # the other nodes are free then
            parts.insert(0, self._measure_between_nodes)
        try:
            for part in parts:
                part()
                self._save(complete=False)
            self._save(complete=True)
        except KeyboardInterrupt:
            self._save(complete=False)
            self.say("interrupted")
        except _OutOfTimeError:
            self.say(f"{self.seconds:g} s are over")
            self._save(complete=self._has_all_of_own_layout)
        except MoespanError:
            self._save(complete=False)
            raise
        if self._keeps_earlier:
            raise MoespanError(f"no curve was measured in time; {self.out} stays as it was")
        return self.profile

    def assist(self) -> None:
        """Run this node's ranks of the collectives between nodes, on a node other than node 0."""
        self._timings_between_nodes()

    @property
    def _keeps_earlier(self) -> bool:
        """Whether a file that was there before is worth more than what was measured so far."""
        return self._was_there and not (self.profile.operations or self.profile.collectives)

    def _save(self, complete: bool) -> None:
        made = self.profile.made
        assert made is not None
        if self._keeps_earlier:
            return
        seconds = time.monotonic() - self._started
        made = msgspec.structs.replace(made, seconds=round(seconds, 1), complete=complete)
        self.profile = msgspec.structs.replace(self.profile, made=made)
        save(self.profile, self.out)

    def _first(self) -> Profile:
        """The device itself."""
        self.say("memory, bandwidth, arithmetic")
        config, device = self.config, self._device
        base = allocated_bytes(device)
        if not is_host(device):
            before = available_bytes(device)
            torch.zeros(1, device=device)
            base = max(before - available_bytes(device), DEVICES[config.device].base_bytes)
        with Probe(config.device, config.dtype) as probe:
            limits = [probe() for _ in range(3)]
        rate = sorted(one.operations_per_s for one in limits)
        figures = DeviceFigures(
            kind=config.device,
            memory_bytes=_measured(available_bytes(device), "free at the start"),
            base_bytes=_measured(base, "this process"),
            allocator_slack=Figure(value=DEVICES[config.device].slack, origin="derived"),
            bytes_per_s=_figure([one.bytes_per_s for one in limits], "probe"),
            operations_per_s={config.dtype: _figure(rate, "probe")},
            floor_us=self._floor(),
            cores=torch.get_num_threads() if is_host(device) else None,
        )
        made = Made(
            machine=machine_name(config.device),
            torch=str(torch.__version__),
            cuda=str(torch.version.cuda or ""),
            moespan=__version__,
            commands=[self.command] if self.command else [],
            clock=self.clock,
            complete=False,
        )
        return Profile(
            schema=SCHEMA,
            name=self.out.stem,
            made=made,
            device=figures,
            launch=self._launch(),
        )

    @property
    def _topology(self) -> Literal["host", "switch"]:
        """Ranks on a host share its memory and its cores."""
        return "host" if is_host(self._device) else "switch"

    def _floor(self) -> Figure:
        """Seconds of a product of few numbers."""
        x = torch.ones(1, 64, device=self._device, dtype=getattr(torch, self.config.dtype))
        weight = x.expand(64, -1).contiguous()
        run = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
        times = timed(run, self._device, clock=self.clock, most=200)
        return _us(times, "a product of 64 numbers")

    def _launch(self) -> Launch:
        x = torch.zeros(64, device=self._device)
        small = timed(lambda: x.add_(1), self._device, clock=self.clock, most=200)
        if is_host(self._device):
            return Launch(
                eager_us=Figure(value=0.0, origin="derived", source="calls compute at once"),
                node_us=_us(small, "a sum of 64 numbers"),
                wait_us=Figure(value=0.0, origin="derived", source="nothing to wait for"),
            )
        synchronize, launches = synchronizer(self._device), 200
        started = time.perf_counter()
        for _ in range(launches):
            x.add_(1)
        eager_s = (time.perf_counter() - started) / launches
        synchronize()
        wait = timed(lambda: x[0].item(), self._device, most=200)
        found = Launch(
            eager_us=_measured(eager_s * 1e6, "launches of a sum"), wait_us=_us(wait, "item")
        )
        return self._with_graphs(found, ops_for(self.config.device, self.config), x)

    def _with_graphs(self, found: Launch, ops: Ops, x: torch.Tensor) -> Launch:
        few, many = 8, 72
        replays = [in_graph(ops, lambda: x.add_(1), calls) for calls in (few, many)]
        if None in replays:
            return found
        short, long = (timed(one, self._device).median_s for one in replays if one is not None)
        node_s = max(long - short, 0.0) / (many - few)
        return msgspec.structs.replace(
            found,
            node_us=_measured(node_s * 1e6, "sums in a graph"),
            replay_us=_measured(max(short - few * node_s, 0.0) * 1e6, "replay of a graph"),
        )

    def _measure_host(self) -> None:
        """The leader's own work: what a decode step takes beside its network and sampling. Where
        the host computes, also the Python of a network of few layers, and of one of many."""
        self.say("the leader's work on the host")
        few, many = _BATCHES
        source = "moespan.measure.overhead, greedy"
        parts = {batch: self._overhead(batch, _FEW_LAYERS) for batch in _BATCHES}
        if self._sweep is not None:
            short_us, long_us = (
                one.get(overhead.NETWORK, 0.0)
                for one in (parts[few], self._overhead(few, _MANY_LAYERS))
            )
            layer_us = max(long_us - short_us, 0.0) / (_MANY_LAYERS - _FEW_LAYERS)
            step_us = max(short_us - _FEW_LAYERS * layer_us, 0.0) + parts[few]["inputs"]
            launch = msgspec.structs.replace(
                self.profile.launch,
                step_us=_measured(step_us, source),
                layer_us=_measured(layer_us, source),
            )
            self.profile = msgspec.structs.replace(self.profile, launch=launch)
        totals = {
            batch: one["total"] - one["sample"] - one.get(overhead.NETWORK, 0.0)
            for batch, one in parts.items()
        }
        each = max(totals[many] - totals[few], 0.0) / (many - few)
        taken_us = few * each + (parts[few]["inputs"] if self._sweep is not None else 0.0)
        host = msgspec.structs.replace(
            self.profile.host,
            step_us=_measured(max(totals[few] - taken_us, 0.0), source),
            sequence_us=_measured(each, source),
        )
        self.profile = msgspec.structs.replace(self.profile, host=host)

    def _overhead(self, batch: int, layers: int) -> dict[str, float]:
        """Microseconds of the parts of a decode step of `batch` sequences."""
        with self._text_model(layers) as folder:
            return overhead.measure(
                folder,
                batch,
                context=128,
                num_steps=40,
                warmup=10,
                now_ns=CLOCKS[self.clock].now_ns,
                sweep=self._sweep,
            )

    @contextmanager
    def _text_model(self, layers: int) -> Iterator[Path]:
        """A folder with a small geometry, and the model's tokenizer if there is one."""
        with tempfile.TemporaryDirectory(prefix="moespan-") as name:
            folder = Path(name)
            vocabulary = max(self.model.vocab_size, 1024)
            small = preset("tiny", {"vocab_size": vocabulary, "num_hidden_layers": layers})
            files.write(folder / "config.json", json.dumps(small))
            for file in ("tokenizer.json", "tokenizer_config.json"):
                source = self.folder / file if self.folder is not None else None
                if source is not None and source.exists():
                    (folder / file).symlink_to(source.resolve())
            yield folder

    def _measure_between_nodes(self) -> None:
        """The level `cluster`: one rank of each node, and all ranks."""
        timings = self._timings_between_nodes()
        axes = [one for one in timings if one.axis in ("tp", "sp")]
        waits = [one for one in timings if one.axis == collectives.WAITS]
        curves = list(_curves(axes, waits, "cluster"))
        # With one rank on each node all bytes cross nodes, and all ranks of a node send at once.
        rate = _rate([one for one in curves if one.ranks == self.nodes.nnodes])
        self._keep_links(curves, timings, Level(name="cluster", bytes_per_s=rate))

    def _timings_between_nodes(self) -> list[collectives.Timing]:
        nodes, ranks = self.nodes, self.nodes.ranks_per_node(self.config.layout)
        parts = [("tp", Layout(tp=nodes.nnodes * ranks))]
        if ranks > 1:
            parts.insert(0, ("sp", Layout(sp=nodes.nnodes, tp=ranks)))
        found = []
        for axis, layout in parts:
            self.say(f"collectives over {getattr(layout, axis)} ranks of {nodes.nnodes} nodes")
            is_whole = axis == "tp"
            plans = _PLANS if is_whole else ()
            wanted = msgspec.structs.replace(
                self._wanted, axes=(axis,), plans_bytes=plans, waits=is_whole
            )
            # Heads of the real model need not be divisible: nothing but messages is made.
            config = replace(self.config, model="", layout=layout)
            found += collectives.measure(config, wanted, nodes=nodes)
        return found

    @property
    def _wanted(self) -> collectives.Wanted:
        host = DEVICES[self.config.device].is_host
        return collectives.Wanted(
            kinds=collectives.KINDS,
            message_bytes=_MESSAGES[:6] if host else _MESSAGES,
            graphs=True,
            plans_bytes=_PLANS,
            clock=self.clock,
            waits=True,
        )

    def _measure_collectives(self) -> None:
        """Every kind over 2, 4, 8, ... ranks of this machine, and the broadcast of plans."""
        world = self.nodes.ranks_per_node(self.config.layout)
        sizes = [size for size in (2, 4, 8, 16, 32) if size <= world and world % size == 0]
        if world > 1 and world not in sizes:
            sizes.append(world)
        curves: list[Collective] = []
        timings: list[collectives.Timing] = []
        for ranks in sizes:
            self.say(f"collectives over {ranks} ranks")
            config = replace(self.config, model="", layout=Layout(tp=ranks))
            found = collectives.measure(config, self._wanted)
            waits = [one for one in found if one.axis == collectives.WAITS]
            curves += _curves([one for one in found if one.axis == "tp"], waits, "node")
            timings += found
        if not curves:
            return
        most = waits[0]  # an all-reduce over the most ranks
        source = f"an all-reduce after work, over {most.ranks} ranks"
        skew_us = _measured(most.median_s * 1e6, source)
        launch = msgspec.structs.replace(self.profile.launch, skew_us=skew_us)
        self.profile = msgspec.structs.replace(self.profile, launch=launch)
        # A host's rate is that of all its ranks together.
        sharers = world if self._topology == "host" else 1
        level = Level(
            name="node",
            devices=world,
            topology=self._topology,
            bytes_per_s=_rate(curves, sharers),
        )
        self._keep_links(curves, timings, level)

    def _keep_links(
        self, curves: list[Collective], timings: list[collectives.Timing], level: Level
    ) -> None:
        """Add a level, its curves, and the leader's messages over its ranks to the profile."""
        profile, host = self.profile, self.profile.host
        small = {
            one.ranks: _measured(one.us[0], "all-reduce of 4 KiB")
            for one in curves
            if one.kind == "all_reduce" and not one.graph
        }
        rows = dict(_rows(host.broadcast)) if host.broadcast else {}
        control = [one for one in timings if one.axis == "control"]
        for ranks in dict.fromkeys(one.ranks for one in control):
            sent = [one for one in control if one.ranks == ranks and one.kind == "broadcast"]
            rows[ranks] = [one.median_s * 1e6 for one in sent]
        results = [one for one in control if one.kind == "send"]
        self.profile = msgspec.structs.replace(
            profile,
            collectives=[*curves, *profile.collectives],
            levels=[msgspec.structs.replace(level, latency_us=small), *profile.levels],
            host=msgspec.structs.replace(
                host,
                broadcast=Broadcast(
                    ranks=sorted(rows),
                    bytes=list(_PLANS),
                    us=[rows[ranks] for ranks in sorted(rows)],
                    source="moespan.measure.collectives",
                ),
                result_us=_measured(results[-1].median_s * 1e6, "a message of 256 bytes"),
            ),
        )

    def _measure_operations(self) -> None:
        """A curve for each shape: those of the config's layout first, then those of others."""
        ops = ops_for(self.config.device, self.config)
        turn_bytes = _LEAST_TURN_BYTES
        if is_host(self._device):
            turn_bytes = max(turn_bytes, 2 * last_level_cache_bytes())
        dtype = getattr(torch, self.config.dtype)
        make = Operations(ops, self.model, self._device, dtype, turn_bytes)
        self._own = list(_curves_of(self.config, self.model, [self.config.layout]))
        layouts = _layouts(self.model) if self.layouts is None else self.layouts
        others = _curves_of(self.config, self.model, layouts)
        found: dict[tuple[Any, ...], Operation] = {}
        for curve in [*self._own, *others]:
            if curve.key in found:
                continue
            for one in self._curve(curve, make, ops):
                found[one.key] = one
                operations = list(found.values())
                self.profile = msgspec.structs.replace(self.profile, operations=operations)
            self._save(complete=False)

    @property
    def _has_all_of_own_layout(self) -> bool:
        have = {one.key for one in self.profile.operations}
        return all(curve.key in have for curve in self._own)

    def _curve(self, curve: Operation, make: Operations, ops: Ops) -> Iterator[Operation]:
        """The curve with its times, and once more in graphs where the device records them."""
        shape = {name: getattr(curve, name) for name in _SHAPE}
        words = ", ".join(f"{name}={size}" for name, size in shape.items() if size)
        self.say(f"{curve.op} {words}")
        eager: list[tuple[int, Times]] = []
        recorded: list[tuple[int, Times]] = []
        calls = 8
        for rows in curve.rows:
            if CLOCKS[self.clock].now() - self._began > self.seconds:
                if len(eager) >= 3:
                    yield _with(curve, eager, False)
                raise _OutOfTimeError
            run = make.run(curve.op, shape, curve.scheme, rows)
            most = 25 if self._sweep is None else _SWEPT_CALLS
            times = timed(run, self._device, clock=self.clock, most=most, sweep=self._sweep)
            eager.append((rows, times))
            if rows <= self.config.max_num_seqs and (replay := in_graph(ops, run, calls)):
                each = timed(replay, self._device, clock=self.clock)
                recorded.append((rows, Times(tuple(one / calls for one in each.seconds))))
            if times.median_s > _LONGEST_CALL_S:
                break
        yield _with(curve, eager, False)
        if recorded:
            yield _with(curve, recorded, True)


_SHAPE = ("n", "k", "experts", "met", "heads", "kv_heads", "head_dim", "context")


def _layouts(model: ModelConfig) -> Iterator[Layout]:
    """Layouts whose ranks hold all the shapes worth measuring."""
    for size in _TENSOR_SIZES:
        for ep in (1, size):
            layout = Layout(tp=size, ep=ep)
            try:
                layout.check(model)
            except LayoutError:
                continue
            yield layout
    for dp in (2, 4, 8, 16):
        if (model.n_routed_experts or 0) >= dp:
            yield Layout(dp=dp, ep=dp)


def _curves_of(
    config: EngineConfig, model: ModelConfig, layouts: Iterable[Layout]
) -> Iterator[Operation]:
    """The curves, without times, of all operations of a rank under each layout."""
    tokens = [rows for rows in _ROWS if rows <= config.max_num_batched_tokens]
    seqs = [rows for rows in _ROWS if rows <= config.max_num_seqs]
    for layout in layouts:
        # All stages together: every operation occurs.
        whole = replace(layout, pp=1, pipeline_layers=None)
        work = RankWork(model, replace(config, layout=whole), whole)
        for task in work.dense_tasks(1, 1):
            rows = seqs if task.part in ("head", "sample") else tokens
            yield _empty(config, task.op, dict(task.shape), task.scheme, rows)
        expert = work.expert_task(1, 1)
        if expert is not None:
            yield from _expert_curves(config, model, expert)
        attention = work.attention_task(1, 1, ())
        shape = dict(attention.shape)
        contexts = [one for one in _CONTEXTS if one < config.max_model_len] or [1]
        for context in contexts:
            yield _empty(
                config, "attention_decode", {**shape, "context": context}, attention.scheme, seqs
            )
        chunks = [rows for rows in tokens if rows >= 16]
        for context in [0, *contexts[1:2]]:
            yield _empty(
                config, "attention_prefill", {**shape, "context": context}, attention.scheme, chunks
            )


def _expert_curves(config: EngineConfig, model: ModelConfig, task: Task) -> Iterator[Operation]:
    """By pairs, for few, half and all of the rank's experts met."""
    shape = dict(task.shape)
    held, chosen = shape["experts"], model.num_experts_per_tok
    most = config.max_num_batched_tokens * chosen
    for met in sorted({min(chosen, held), max(held // 2, 1), held}):
        rows = [met * times for times in _ROWS if met * times <= most]
        yield _empty(config, "experts", {**shape, "met": met}, task.scheme, rows)


def _empty(
    config: EngineConfig, op: str, shape: dict[str, int], scheme: str | None, rows: list[int]
) -> Operation:
    curve = Operation(op=op, dtype=config.dtype, scheme=scheme, rows=rows, us=[])
    return msgspec.structs.replace(curve, **shape)


def _with(curve: Operation, points: list[tuple[int, Times]], graph: bool) -> Operation:
    return msgspec.structs.replace(
        curve,
        rows=[rows for rows, _ in points],
        us=[times.median_s * 1e6 for _, times in points],
        p10_us=[times.quantile_s(0.1) * 1e6 for _, times in points],
        p90_us=[times.quantile_s(0.9) * 1e6 for _, times in points],
        samples=min(len(times.seconds) for _, times in points),
        graph=graph,
        source="moespan calibrate",
    )


def _rows(table: Broadcast) -> Iterator[tuple[int, list[float]]]:
    return zip(table.ranks, table.us, strict=True)


def _rate(curves: list[Collective], sharers: int = 1) -> Figure:
    """Bytes per second that a rank sends in the largest all-reduce, times `sharers`."""
    last = [one for one in curves if one.kind == "all_reduce" and not one.graph][-1]
    sent = sharers * sent_bytes(last.kind, last.ranks, last.bytes[-1])
    return _measured(sent / (last.us[-1] * 1e-6), "the largest all-reduce")


def _curves(
    timings: list[collectives.Timing], waits: list[collectives.Timing], level: str
) -> Iterator[Collective]:
    """The curves of collectives over so many ranks, with what they take longer after work."""
    skews = {one.kind: one.median_s * 1e6 for one in waits}
    keys = dict.fromkeys((one.kind, one.ranks, one.graph) for one in timings)
    for kind, ranks, graph in keys:
        mine = [one for one in timings if (one.kind, one.ranks, one.graph) == (kind, ranks, graph)]
        yield Collective(
            kind=kind,
            level=level,
            ranks=ranks,
            graph=graph,
            skew_us=None if graph else skews.get(kind),
            bytes=[one.message_bytes for one in mine],
            us=[one.median_s * 1e6 for one in mine],
            p10_us=[one.p10_s * 1e6 for one in mine],
            p90_us=[one.p90_s * 1e6 for one in mine],
            source="moespan calibrate",
        )


def _measured(value: float, source: str) -> Figure:
    return Figure(value=float(value), origin="measured", source=source)


def _figure(values: list[float], source: str) -> Figure:
    ordered = sorted(values)
    return Figure(
        value=ordered[len(ordered) // 2],
        origin="measured",
        source=source,
        p10=ordered[0],
        p90=ordered[-1],
        n=len(ordered),
    )


def _us(times: Times, source: str) -> Figure:
    return _figure([one * 1e6 for one in times.seconds], source)
