"""From a step's logits to its result, possibly still being computed, and on to the leader."""

from __future__ import annotations

from itertools import accumulate

import msgspec
import torch
from torch import Tensor

from moespan.engine.sampler import Sampling, token_logprobs
from moespan.engine.step import PromptRow, PromptScores, StepPlan, StepResult
from moespan.parallel.beats import Beat, named
from moespan.parallel.mesh import Mesh
from moespan.planner.memory import REPORTED_ROWS

_DEVICE_WAIT = named("the wait for the device", "", "", ())


class Pending:
    """The result of a step, possibly still being computed on the device.

    Args:
        logits: those of `logit_rows`, [R, V] in the activations' dtype. If the plan reports on no
            prompt, the next step may overwrite them.
        beat: says that this rank waits for its device.
    """

    def __init__(self, logits: Tensor, plan: StepPlan, beat: Beat) -> None:
        self._plan = plan
        self._beat = beat
        self.sampling = Sampling(logits[: len(plan.samples)], plan.samples, plan.positions)
        self._prompt_logits = logits[len(plan.samples) :] if plan.prompts else None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def wait(self) -> StepResult:
        """Wait for the result: the only place where the host waits for the device."""
        self._beat.enter(_DEVICE_WAIT)
        prompts, at = [], 0
        for prompt in self._plan.prompts:
            assert self._prompt_logits is not None
            count = self._plan.query_lens[prompt.sequence]
            prompts.append(_score(self._prompt_logits[at : at + count], prompt))
            at += count
        samples = self.sampling.wait()
        self._beat.leave()
        return StepResult(samples, prompts)


def collect_results(
    mesh: Mesh, plans: list[StepPlan | None], own: Pending | None
) -> list[StepResult | None]:
    """On the leader: wait for the result of each replica's plan; None where there is no plan.

    Args:
        own: the result of this rank's replica, if this rank is its speaker.
    """
    results: list[StepResult | None] = []
    for plan, speaker in zip(plans, mesh.speakers, strict=True):
        if plan is None:
            results.append(None)
        elif speaker == mesh.rank:
            assert own is not None
            results.append(own.wait())
        else:
            results.append(_decode_result(mesh.control.receive(speaker)))
    return results


_decode_result = msgspec.msgpack.Decoder(StepResult).decode


def logit_rows(plan: StepPlan) -> list[int]:
    """Query tokens whose logits the plan needs: the sampling rows, then all rows of each prompt."""
    ends = list(accumulate(plan.query_lens))
    rows = [ends[sequence] - 1 for sequence in plan.sampled]
    for prompt in plan.prompts:
        end = ends[prompt.sequence]
        rows += range(end - plan.query_lens[prompt.sequence], end)
    return rows


def _score(logits: Tensor, prompt: PromptRow) -> PromptScores:
    """The scores of one sequence's query tokens, from logits [Q, V] in the activations' dtype.

    A few rows at a time become float32: all at once would take more than any other part of a step.
    """
    logprobs = []
    if prompt.logprobs is not None:
        for at in range(0, len(prompt.targets), REPORTED_ROWS):
            targets = prompt.targets[at : at + REPORTED_ROWS]
            rows = logits[at : at + len(targets)].float()
            logprobs += token_logprobs(rows, targets, prompt.logprobs)
    raw = logits.float().cpu().numpy().tobytes() if prompt.logits else b""
    return PromptScores(logprobs, raw)
