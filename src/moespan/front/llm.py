"""`LLM`: the engine from Python, with vLLM's names where the meaning is the same."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moespan.checkpoint.experts import ExpertPlacement, expert_rule
from moespan.config import EngineConfig, Layout, ModelConfig, Nodes
from moespan.engine.questions import Stats, Trace, Traffic
from moespan.engine.request import (
    OutputDelta,
    Request,
    SamplingParams,
    check_request,
    refusal,
)
from moespan.errors import ConfigError, EngineDeadError, LayoutError, RequestError
from moespan.front.hub import resolve
from moespan.front.outputs import RequestOutput
from moespan.machine.device import choose_device
from moespan.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moespan.engine.client import EngineClient
    from moespan.engine.info import EngineInfo, EngineStats
    from moespan.engine.trace import Observation
    from moespan.parallel.counters import TrafficRows

Prompt = str | list[int] | Mapping[str, object]
"""Text, token ids, or vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

Message = Mapping[str, str]

Encoded = tuple[str | None, list[int]]
"""A prompt's text, if it was given as text, and its token ids."""

# Requests handed to the engine ahead of need, as a multiple of what one step takes.
_WINDOW = 2


class LLM:
    """A running engine: loads the model on construction, use it as a context manager or `close` it.

    With more than one rank it starts them as processes of their own, unless the program itself was
    started by `torchrun`: then its processes are the ranks, the leader goes on, and the others
    serve it inside this constructor and exit when it closes. So do the nodes other than node 0 of
    a job that runs on many: the same program runs on all, with another `node_rank` on each.

    Args:
        model: checkpoint folder, or a name for the hub clients.
        tensor_parallel_size: ranks over which heads, widths and the vocabulary are split.
        expert_parallel_size: ranks over which whole routed experts are spread.
        pipeline_parallel_size: stages into which the layers are split.
        sequence_parallel_size: ranks over which the tokens of a step are split.
        data_parallel_size: replicas over which requests are spread.
        enable_expert_parallel: the largest expert_parallel_size that the other sizes allow.
        pipeline_layers: layers of each stage; None cuts by cost.
        moe_dispatch: `auto`, `replicated`, `all_gather`, `all_to_all`, or on NPUs `fused`.
        expert_placement: `contiguous`, `round_robin`, or a JSON file.
        device: `auto`, `npu`, `cuda` or `cpu`.
        dtype: `auto` is the checkpoint's.
        quantization: `int8` or `w8a8` holds matrices as 8-bit integers, `fp8` as 8-bit floats and
            `int4` as 4-bit integers; `w8a8` and `fp8` round what they are multiplied with, too;
            None is the checkpoint's.
        kv_cache_dtype: `auto` is the dtype; `int8` halves the KV cache, and more for float32.
        max_model_len: most tokens of one sequence; None is the model's own limit.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step.
        block_size: tokens in one block of the KV cache; None suits the device.
        num_blocks: blocks of the KV cache; None sizes it from the free memory.
        load_format: `auto`, `safetensors`, or `dummy` for random weights without a file (the
            folder then needs only a config.json).
        seed: of dummy weights and of requests that bring no seed of their own.
        enable_prefix_caching: share the cache of equal prefixes.
        check_finite: look for NaN and Inf in every weight while loading.
        bind: which cores and NUMA node each rank gets: `auto`, `off`, or a map of local rank to
            node as in `0:0,1:1`. Without ranks of their own `auto` leaves this process alone.
        enforce_eager: never run decode steps as recorded graphs, where the device has them.
        npu_fused_all_reduce: on NPUs, from how many rows on a matmul and its all-reduce are one
            operator; 0 is never.
        cuda_one_shot_bytes: up to what size GPUs joined by NVLink sum over tp in one kernel instead
            of NCCL's; 0 is never.
        npu_weight_format: on NPUs, `nd`, or `nz` for matrices in tiles.
        async_scheduling: plan a step while the one before runs; None: on NPUs and GPUs.
        trust_remote_code: refused: no code from a checkpoint is ever run.
        nnodes: machines that run the job, each as many ranks as any other.
        node_rank: this one's number, from 0.
        master_addr: address of node 0 that the others reach.
        master_port: port of node 0 where they meet.
        join_timeout_s: most seconds that a node waits for the others to come.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: it cannot start, and why.
        MeetingError: the nodes did not come together.
        EngineDeadError: a rank died while starting; on a node other than node 0: or at any time.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        sequence_parallel_size: int = 1,
        data_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        pipeline_layers: Sequence[int] | None = None,
        moe_dispatch: str = "auto",
        expert_placement: str = "contiguous",
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        block_size: int | None = None,
        num_blocks: int | None = None,
        load_format: str = "auto",
        seed: int = 0,
        enable_prefix_caching: bool = True,
        check_finite: bool = False,
        bind: str = "auto",
        enforce_eager: bool = False,
        npu_fused_all_reduce: int = 0,
        cuda_one_shot_bytes: int = EngineConfig.cuda_one_shot_bytes,
        npu_weight_format: str = "nd",
        async_scheduling: bool | None = None,
        trust_remote_code: bool = False,
        nnodes: int = Nodes.nnodes,
        node_rank: int = Nodes.node_rank,
        master_addr: str = Nodes.master_addr,
        master_port: int = Nodes.master_port,
        join_timeout_s: float = Nodes.join_timeout_s,
    ) -> None:
        if trust_remote_code:
            raise ConfigError(
                "trust_remote_code is refused: the model is built in, and code that comes with a "
                "checkpoint is never run"
            )
        nodes = Nodes(nnodes, node_rank, master_addr, master_port, join_timeout_s)
        folder = resolve(model)
        self.model_config = ModelConfig.from_pretrained(folder)
        device = choose_device(device)
        layout = Layout.make(
            self.model_config,
            tensor_parallel_size=tensor_parallel_size,
            expert_parallel_size=expert_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            sequence_parallel_size=sequence_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_expert_parallel=enable_expert_parallel,
            pipeline_layers=pipeline_layers,
        )
        if max_model_len is None:
            max_model_len = self.model_config.max_position_embeddings
        if block_size is None:
            block_size = 128 if device == "npu" else EngineConfig.block_size
        self.config = EngineConfig(
            model=str(folder.resolve()),
            layout=layout,
            device=device,
            dtype=self.model_config.dtype if dtype == "auto" else dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            load_format="safetensors" if load_format == "auto" else load_format,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            check_finite=check_finite,
            moe_dispatch=moe_dispatch,
            expert_placement=expert_rule(expert_placement),
            bind=bind,
            enforce_eager=enforce_eager,
            npu_fused_all_reduce=npu_fused_all_reduce,
            cuda_one_shot_bytes=cuda_one_shot_bytes,
            npu_weight_format=npu_weight_format,
            async_scheduling=async_scheduling,
        )
        self._check_experts()
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self._client = _connect(self.config, nodes)
        self._numbers = itertools.count()
        self._live: dict[str, RequestOutput] = {}

    @property
    def info(self) -> EngineInfo:
        """Facts about the running engine: layout, device, load time, blocks of the KV cache, ..."""
        return self._client.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt; the outputs come in the order of the prompts.

        Raises:
            RequestError: a prompt or its parameters break a limit; nothing was run.
            EngineDeadError: the ranks are gone.
        """
        # A list that begins with a number is one prompt's token ids.
        is_one = isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if is_one else prompts  # type: ignore[assignment]
        return self._run_all(many, self._encode, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the checkpoint's chat template.

        Raises:
            RequestError: the messages are malformed, or the checkpoint has no chat template.
            TokenizerError: the chat template is faulty.
            EngineDeadError: the ranks are gone.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self._run_all(many, self.chat_prompt, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """A conversation as the text and the token ids that the model is given."""
        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer, and this checkpoint has none")
        text = self.tokenizer.apply_chat_template(messages)
        # The template writes the special tokens itself.
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def request(
        self,
        prompt: Prompt | Encoded,
        params: SamplingParams | None = None,
        *,
        prompt_logits: bool = False,
    ) -> tuple[str | None, Request]:
        """A checked request for `stream`, with the prompt's text where it has one.

        Raises:
            RequestError: the prompt or its parameters break a limit.
        """
        text, token_ids = prompt if isinstance(prompt, tuple) else self._encode(prompt)
        request = Request(
            id=str(next(self._numbers)),
            prompt_token_ids=token_ids,
            params=params or SamplingParams(),
            prompt_logits=prompt_logits,
        )
        check_request(request, self.config.max_model_len, self.model_config.vocab_size)
        return text, request

    def stream(
        self,
        requests: Iterable[tuple[str | None, Request]],
        observe: Callable[[OutputDelta], object] | None = None,
    ) -> Iterator[RequestOutput]:
        """Run any number of requests; yield each as it finishes.

        Only as many are taken from `requests` as keep the engine busy, so memory stays bounded.
        A request that fails is yielded with its `error`; the others go on. Within one thread,
        streams may be mixed, and each yields its own. Closing one aborts what it has not yielded.

        Args:
            observe: called with what a step brings to one of these requests, as it comes.

        Raises:
            EngineDeadError: the ranks are gone; what was yielded before was finished.
        """
        source = iter(requests)
        mine: dict[str, RequestOutput] = {}
        try:
            while True:
                room = self._num_wanted - len(mine)
                for text, request in itertools.islice(source, room):
                    mine[request.id] = self._live[request.id] = RequestOutput.begin(request, text)
                    try:
                        self._client.add(request)
                    except RequestError as error:
                        self._take_in(refusal(request, error))
                if not mine:
                    return
                finished = [output for output in mine.values() if output.finished]
                for output in finished:
                    del mine[output.request_id], self._live[output.request_id]
                    yield output
                if not finished:
                    deltas = self._client.receive()
                    self._take_in(deltas)
                    if observe is not None:
                        for delta in deltas:
                            if delta.id in mine:
                                observe(delta)
        finally:
            for request_id in mine:
                del self._live[request_id]
                with contextlib.suppress(EngineDeadError):
                    self._client.abort(request_id)

    def relayout(self, layout: Layout, moe_dispatch: str = "auto") -> None:
        """Cut the model anew over the same ranks, which is faster than to start them again.

        Raises:
            LayoutError: it does not fit the model, or has another number of ranks.
        """
        if layout.world_size != self.config.layout.world_size:
            raise LayoutError(
                f"layout {layout} has {layout.world_size} ranks, but "
                f"{self.config.layout.world_size} are running"
            )
        layout.check(self.model_config)
        self.config = replace(self.config, layout=layout, moe_dispatch=moe_dispatch)
        self._check_experts()
        self._client.reload(self.config)

    def stats(self) -> EngineStats:
        """Queues, cache use and counts since the start or `relayout`."""
        return self._client.ask(Stats())

    def traffic(self) -> list[TrafficRows]:
        """Calls and bytes that each rank has sent to others since the start or `relayout`: rows of
        axis, collective, module, calls and bytes. Steps in flight end first."""
        return self._client.ask(Traffic())

    def trace(self, token_ids: list[int]) -> list[Observation]:
        """Values inside the network for one prompt, layer after layer.

        Raises:
            RequestError: the engine is not idle, or the prompt does not fit into one step.
        """
        return self._client.ask(Trace(token_ids))

    def close(self) -> None:
        """End the engine and its ranks. Idempotent."""
        self._client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_experts(self) -> None:
        """Refuse what cannot work before any rank is started."""
        self.config.layout.check_dispatch(self.config.moe_dispatch)
        ExpertPlacement.make(self.config.expert_placement, self.model_config, self.config.layout)

    @property
    def _num_wanted(self) -> int:
        """Requests that keep every replica and every pipeline stage busy."""
        layout = self.config.layout
        return _WINDOW * self.config.max_num_seqs * layout.dp * layout.pp

    def _encode(self, prompt: object) -> Encoded:
        given = prompt
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "the prompt is text, and this checkpoint has no tokenizer.json; give token "
                    'ids: a list in Python, {"prompt": [1, 2]} in a line of --input'
                )
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError(f"{given!r:.80} is neither text nor a list of token ids")
        return None, prompt

    def _take_in(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if (output := self._live.get(delta.id)) is not None:  # None: aborted meanwhile
                output.add(delta)

    def _run_all(
        self,
        prompts: Sequence[Any],
        encode: Callable[[Any], Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for all, "
                "or one for each"
            )
        requests = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self.request(encode(prompt), one))
            except RequestError as error:
                raise RequestError(f"prompt {number}: {error}") from None
        outputs = tqdm(
            self.stream(requests), total=len(requests), unit="prompt", disable=not use_tqdm
        )
        by_id = {output.request_id: output for output in outputs}
        return [by_id[request.id] for _, request in requests]


def _connect(config: EngineConfig, nodes: Nodes) -> EngineClient:
    """Start the ranks that are missing and connect to the leader; return on node 0 only.

    Torch is imported only where this process computes.
    """
    from moespan.launch.job import started_by_torchrun

    if nodes.nnodes > 1:
        if started_by_torchrun():
            raise ConfigError(
                f"nnodes={nodes.nnodes} is for torchrun to know, which started this program; give "
                "it to torchrun alone"
            )
        _warn_if_tp_crosses(config.layout, nodes)
    if nodes.node_rank > 0:
        from moespan.launch.ranks import serve_node

        serve_node(config, nodes)
    if config.layout.world_size > 1 and not started_by_torchrun():
        from moespan.launch.ranks import RanksClient

        return RanksClient(config, nodes=nodes)
    # Here this process is a rank, and what torch is to heed has to be set before it is imported.
    from moespan.machine import environment

    environment.apply(environment.environment_of_this_process(config))
    from moespan.launch.local import join

    return join(config)


def _warn_if_tp_crosses(layout: Layout, nodes: Nodes) -> None:
    ranks = nodes.ranks_per_node(layout)
    if ranks % layout.tp and nodes.node_rank == 0:
        print(
            f"moespan: tp={layout.tp} crosses nodes, which have {ranks} of the "
            f"{layout.world_size} ranks each: every layer waits for the network; it would not if "
            "each node had a multiple of tp ranks",
            file=sys.stderr,
        )
