"""`LLM`: the engine from Python, with vLLM's names where the meaning is the same."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import numbers
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from tqdm import tqdm

from moespan.config import Layout
from moespan.engine.client import EngineClient
from moespan.engine.interrupts import hold_interrupts
from moespan.engine.questions import ExpertCounts, Memory, Stats, Trace, Traffic
from moespan.engine.request import OutputDelta, Request, SamplingParams, refusal
from moespan.errors import ConfigError, EngineDeadError, LayoutError, RequestError, shown
from moespan.forks import Owner
from moespan.front.live_texts import LiveTexts
from moespan.front.outputs import RequestOutput
from moespan.front.prompts import Encoded, Message, Prompt, Prompts
from moespan.front.settings import FIELD_OF_AXIS, Settings, check
from moespan.front.start import connect
from moespan.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moespan.engine.info import EngineInfo, EngineStats
    from moespan.engine.trace import Observation
    from moespan.parallel.counters import TrafficRows
    from moespan.planner.memory import RankMemory

P = ParamSpec("P")
Self_ = TypeVar("Self_")

# A request may come earlier than was said.
_LONGEST_SLEEP_S = 1.0

# Requests that the engine has at once, as a multiple of the requests that one step takes.
_WINDOW = 2


def _options_of(
    settings: Callable[P, Settings],
) -> Callable[[Callable[[Self_, Settings], None]], Callable[Concatenate[Self_, P], None]]:
    """Give `__init__` the parameters of `settings`, also for type checkers, editors and `help`."""

    def decorate(
        init: Callable[[Self_, Settings], None],
    ) -> Callable[Concatenate[Self_, P], None]:
        @functools.wraps(init)
        def wrapper(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> None:
            _refuse_unknown(kwargs)
            init(self, settings(*args, **kwargs))

        own = inspect.signature(init)
        shown = [
            *list(own.parameters.values())[:1],
            *inspect.signature(settings).parameters.values(),
        ]
        wrapper.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _refuse_unknown(options: Mapping[str, object]) -> None:
    """Raise `TypeError` for an option that `Settings` does not have, with the nearest one."""
    known = [field.name for field in fields(Settings)]
    for name in options.keys() - set(known):
        near = [FIELD_OF_AXIS[name]] if name in FIELD_OF_AXIS else get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "help(LLM) names them all"
        raise TypeError(f"LLM has no option {name!r}; {hint}")


class LLM:
    """A running engine. The constructor loads the model; use `LLM` as a context manager or `close`
    it.

    If there are several ranks, the constructor starts each as a process of its own. Under
    `torchrun` the processes of the program are the ranks instead. The leader's constructor returns.
    On all other ranks the constructor serves the leader, and exits when the engine closes.

    A job on several nodes runs the same program on each, with another `node_rank`. The constructor
    returns on node 0. On the other nodes it serves node 0, and exits when the engine closes.

    Args:
        model: checkpoint folder, or a name for the hub clients.
        options: the fields of `moespan.front.settings.Settings`, by keyword. Its docstring and
            those of its bases, `EngineOptions` and `Nodes`, describe each.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: the engine cannot start.
        MeetingError: the nodes did not come together.
        EngineDeadError: a rank died while starting or, on nodes other than node 0, at any time.
    """

    @_options_of(Settings)
    def __init__(self, settings: Settings) -> None:
        self._start(settings)

    @classmethod
    def from_settings(cls, settings: Settings) -> LLM:
        """Start an engine from `settings`. Raises the errors of the constructor."""
        llm = cls.__new__(cls)
        llm._start(settings)
        return llm

    def _start(self, settings: Settings) -> None:
        model_config, self.config, nodes = settings.resolve()
        if model_config is None:
            raise ConfigError("model=None names no model; give a checkpoint folder")
        self.model_config = model_config
        self.tokenizer = Tokenizer.from_pretrained(self.config.model)
        self._prompts = Prompts(self.tokenizer, self.config.max_model_len, model_config.vocab_size)
        self._owner = Owner()
        self._connected = connect(self.config, nodes)
        self._live: dict[str, RequestOutput] = {}
        self._texts = LiveTexts(self.tokenizer, self._client.abort)

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

        A call with a prompt that breaks a limit is refused as a whole, before anything is computed,
        as in vLLM. To run the others nevertheless, make each with `request`, which raises for that
        prompt alone, and hand them to `stream`.

        Raises:
            RequestError: prompts or their parameters break a limit; names them all. No prompt was
                run.
            EngineDeadError: the ranks are gone.
        """
        if isinstance(prompts, str | Mapping):
            many: Sequence[Any] = [prompts]
        else:
            # A list that begins with a number is one prompt's token ids.
            _require_list("prompts", prompts, "a prompt or a list of prompts")
            many = [prompts] if prompts and isinstance(prompts[0], numbers.Integral) else prompts
        return self._run_all(many, self._prompts.encode, sampling_params, use_tqdm)

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
        _require_list("messages", messages, "a list of messages or a list of such lists")
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self._run_all(many, self.chat_prompt, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message]) -> Encoded:
        """Text and token ids of a conversation, as the model gets them.

        Raises:
            RequestError: the messages are malformed, or the checkpoint has no chat template.
            TokenizerError: the chat template is faulty.
        """
        return self._prompts.encode_chat(messages)

    def request(
        self,
        prompt: Prompt | Encoded,
        params: SamplingParams | None = None,
        *,
        prompt_logits: bool = False,
    ) -> tuple[str | None, Request]:
        """The prompt's text, if it has one, and a checked request for `stream`.

        Raises:
            RequestError: the prompt or its parameters break a limit.
        """
        return self._prompts.request(prompt, params, prompt_logits=prompt_logits)

    def stream(
        self,
        requests: Iterable[tuple[str | None, Request] | float],
        observe: Callable[[OutputDelta], object] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Run any number of requests; yield the output of each as it finishes.

        Requests are taken from `requests` only as fast as the engine needs them, so memory stays
        bounded. A request that fails is yielded with its `error`; the others go on. Several streams
        may run in turns within one thread; each yields its own requests. Closing a stream aborts
        its unfinished requests, and so does Ctrl-C. It waits for the step under way, and the engine
        goes on to the next request. A second Ctrl-C does not wait, and may end the engine.

        Args:
            requests: pairs of a prompt's text (or None) and its request, as `request` makes them. A
                number in between says that the next request will be there after so many seconds;
                `requests` is asked again then, or earlier.
            observe: called with every delta of these requests, as soon as its step is done.

        Raises:
            EngineDeadError: the ranks are gone; every output yielded so far was finished.
        """
        source = iter(requests)
        mine: dict[str, RequestOutput] = {}
        try:
            while True:
                room = self._num_wanted - len(mine)
                new, wait_s = _take_due(itertools.islice(source, room))
                with hold_interrupts():
                    for text, request in new:
                        output = RequestOutput.begin(request, text)
                        mine[request.id] = self._live[request.id] = output
                        self._texts.begin(request)
                    self._add([request for _, request in new])
                if not mine:
                    if wait_s is None:
                        return
                    time.sleep(min(wait_s, _LONGEST_SLEEP_S))
                    continue
                finished = [output for output in mine.values() if output.finished]
                for output in finished:
                    del mine[output.request_id]
                    self._forget(output.request_id)
                    yield output
                if not finished:
                    with hold_interrupts():
                        deltas = self._texts.complete(self._client.receive(wait_s))
                        self._take_in(deltas)
                    if observe is not None:
                        for delta in deltas:
                            if delta.id in mine:
                                observe(delta)
        finally:
            with hold_interrupts():
                for request_id in mine:
                    self._forget(request_id)
                    with contextlib.suppress(EngineDeadError):
                        self._client.abort(request_id)

    def relayout(self, layout: Layout, moe_dispatch: str = "auto") -> None:
        """Load the model under another layout on the same ranks, faster than a new start.

        Raises:
            LayoutError: `layout` does not fit the model, or has another number of ranks.
        """
        if layout.world_size != self.config.layout.world_size:
            raise LayoutError(
                f"layout {layout} has {layout.world_size} ranks, but "
                f"{self.config.layout.world_size} are running"
            )
        config = replace(self.config, layout=layout, moe_dispatch=moe_dispatch)
        check(config, self.model_config)
        self.config = config
        self._client.reload(config)

    def stats(self) -> EngineStats:
        """Queues, cache use and counts since the start or `relayout`."""
        return self._client.ask(Stats())

    def traffic(self) -> list[TrafficRows]:
        """Calls and bytes that each rank has sent to others since the start or `relayout`: rows of
        axis, collective, module, calls and bytes. Steps in flight end first."""
        return self._client.ask(Traffic())

    def memory(self) -> list[RankMemory]:
        """Bytes that each rank takes, by part, measured since the start or `relayout`. Steps in
        flight end first."""
        return self._client.ask(Memory())

    def expert_counts(self) -> dict[int, list[int]]:
        """Layer → how many tokens chose each expert since the start or `relayout`; only layers
        with experts. Every computed token counts in each layer, once for each of its experts.
        Steps in flight end first.

        Raises:
            RequestError: the engine runs without `expert_stats`.
        """
        return self._client.ask(ExpertCounts())

    def trace(self, token_ids: list[int]) -> list[Observation]:
        """Values inside the network for one prompt, layer after layer.

        Raises:
            RequestError: the engine is not idle, or the prompt does not fit into one step.
        """
        return self._client.ask(Trace(token_ids))

    def close(self) -> None:
        """Stop the engine and its ranks. Idempotent. Does nothing in a fork of their process."""
        if self._owner.is_here:
            self._connected.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _client(self) -> EngineClient:
        self._owner.check()
        return self._connected

    @property
    def _num_wanted(self) -> int:
        """Number of requests that keep every replica and every pipeline stage busy."""
        layout = self.config.layout
        return _WINDOW * self.config.max_num_seqs * layout.dp * layout.pp

    def _add(self, requests: Sequence[Request]) -> None:
        """Start requests together, so that the same call always makes the same steps.

        Those that no message can hold are halved, until the one that is too large is found.
        """
        if not requests:
            return
        try:
            self._client.add(*requests)
        except RequestError as error:
            if len(requests) == 1:
                self._take_in(refusal(requests[0], error))
                return
            half = len(requests) // 2
            self._add(requests[:half])
            self._add(requests[half:])

    def _forget(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._texts.drop(request_id)

    def _take_in(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if (output := self._live.get(delta.id)) is not None:  # None if aborted meanwhile
                output.add(delta)

    def _run_all(
        self,
        prompts: Sequence[Any],
        encode: Callable[[Any], Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [SamplingParams() if params is None else params] * len(prompts)
        _require_list(
            "sampling_params", params, "a SamplingParams or a list of one for each prompt"
        )
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for all, "
                "or one for each"
            )
        requests, refused = [], []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self.request(encode(prompt), one))
            except RequestError as error:
                refused.append((number, error))
        if refused:
            raise _refusal_of_call(refused)
        outputs = tqdm(
            self.stream(requests), total=len(requests), unit="prompt", disable=not use_tqdm
        )
        by_id = {output.request_id: output for output in outputs}
        return [by_id[request.id] for _, request in requests]


def _refusal_of_call(refused: Sequence[tuple[int, RequestError]]) -> RequestError:
    """One error for the refused prompts of a call, given as their numbers and reasons."""
    number, error = refused[0]
    others = ", ".join(str(other) for other, _ in refused[1:11])
    more = f" (refused as well: {others}{', ...' if len(refused) > 11 else ''})" if others else ""
    return RequestError(f"prompt {number}: {error}{more}")


def _take_due(
    source: Iterable[tuple[str | None, Request] | float],
) -> tuple[list[tuple[str | None, Request]], float | None]:
    """The requests of `source` up to a number, and this number."""
    due: list[tuple[str | None, Request]] = []
    for one in source:
        if isinstance(one, float):
            return due, min(one, threading.TIMEOUT_MAX)
        due.append(one)
    return due, None


def _require_list(name: str, value: object, rule: str) -> None:
    if not isinstance(value, Sequence):
        raise RequestError(f"{name}={shown(value)} must be {rule}")
