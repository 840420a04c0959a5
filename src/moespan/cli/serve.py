"""`moespan serve`: an OpenAI-compatible HTTP server over an engine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from typing import Any

from moespan import log
from moespan.cli.flags import add_print_env_flag, add_settings_flags, settings_of
from moespan.config import EngineConfig, ModelConfig
from moespan.errors import ConfigError, MoespanError, install_hint
from moespan.front.start import warn_if_tp_crosses_nodes
from moespan.planner.memory import fit
from moespan.serve.options import ServeOptions, default_text, flag_of, options
from moespan.units import bytes_in_words

SUMMARY = "serve a model over HTTP, as OpenAI does"

_NEEDED = ("starlette", "uvicorn", "h11", "prometheus_client")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    add_settings_flags(parser, model_is_required=False)
    add_print_env_flag(parser)
    parser.add_argument(
        "--print-openapi",
        action="store_true",
        help="print the OpenAPI document of the server, and start nothing",
    )
    group = parser.add_argument_group("server")
    for one in options():
        group.add_argument(
            flag_of(one.name), *one.metadata["aliases"], dest=one.name, **_argument(one)
        )


def _argument(one: Any) -> dict[str, Any]:
    """What argparse needs to know of a field of `ServeOptions`."""
    meaning = one.metadata["help"]
    if one.type == "bool":
        return {"action": "store_true", "help": meaning}
    default = default_text(one)
    argument: dict[str, Any] = {
        "default": one.default,
        "help": f"{meaning} ({default})" if default else meaning,
    }
    if "tuple" in one.type:
        argument |= {"nargs": "+", "metavar": "TEXT", "default": None}
    elif "int" in one.type:
        argument |= {"type": int, "metavar": "N"}
    elif "float" in one.type:
        argument |= {"type": float, "metavar": "SECONDS"}
    else:
        argument |= {"metavar": "TEXT"}
    if one.metadata["choices"]:
        argument |= {"choices": one.metadata["choices"], "metavar": None}
    return argument


def run(args: argparse.Namespace) -> int:
    """Serve a model over HTTP with OpenAI's routes, until SIGTERM or Ctrl-C."""
    _check_extra()
    if args.print_openapi:
        from moespan.serve.openapi import document

        print(document())
        return 0
    from moespan.serve.auth import Keys, check_reach
    from moespan.serve.served import ServedModel
    from moespan.serve.server import check_open_files, listen, listen_apart

    if not hasattr(args, "model"):  # the flags of an engine have no default
        args.usage_error("the argument MODEL is required")
    settings = settings_of(args)
    chosen = _chosen(args)
    log.set_up(args.log_level, chosen.log_format)
    if settings.node_rank > 0:
        from moespan.launch.lives import serve_node

        _, config, nodes = settings.resolve(to_run=False)
        serve_node(config, nodes, comes_back=True)
    keys = Keys(chosen)
    check_reach(chosen, keys)
    check_open_files()
    with contextlib.ExitStack() as listening:
        socks = [listening.enter_context(listen(chosen))]
        socks += map(listening.enter_context, listen_apart(chosen))
        # The front needs no device: the ranks find out whether theirs works.
        model_config, config, nodes = settings.resolve(to_run=False)
        assert model_config is not None
        log.logger.info("%s", _memory_line(config, model_config))
        model = ServedModel.load(args.model, config, model_config, chosen)
        _serve(config, nodes, model, keys, chosen, socks)
    return 0


def _memory_line(config: EngineConfig, model_config: ModelConfig) -> str:
    """What the weights and a sequence take on the rank that holds most."""
    needed = fit(config, model_config, room_bytes=None)
    per_sequence = needed.cache_bytes_per_token * config.max_model_len
    workspace = needed.memory.total_bytes - needed.memory.weight_bytes
    return (
        f"memory of the fullest rank: weights {bytes_in_words(needed.memory.weight_bytes)}, "
        f"workspace {bytes_in_words(workspace)}, KV cache {bytes_in_words(per_sequence)} for a "
        f"sequence of {config.max_model_len} tokens"
    )


def _serve(config: Any, nodes: Any, model: Any, keys: Any, chosen: Any, socks: Any) -> None:
    from moespan.launch.lives import Lives
    from moespan.serve.program import Program

    warn_if_tp_crosses_nodes(config.layout, nodes)
    tracing = None
    if chosen.otlp_traces_endpoint is not None:
        from moespan.serve.tracing import Tracing

        tracing = Tracing.to(chosen.otlp_traces_endpoint, model.names[0])
    lives = Lives(config, nodes)
    reason = ""
    try:
        Program(config, model, keys, chosen, socks, lives.start, tracing).run()
    except MoespanError as error:
        reason = str(error)
        raise
    finally:
        lives.end(reason)
    log.logger.info("the server has ended")


def _chosen(args: argparse.Namespace) -> ServeOptions:
    """The options that the flags ask for."""
    given: dict[str, Any] = {}
    for one in options():
        value = getattr(args, one.name)
        if value is not None:
            given[one.name] = tuple(value) if isinstance(value, list) else value
    origins = given.get("allowed_origins", ())
    if len(origins) == 1 and origins[0].startswith("["):  # vLLM takes a JSON list
        with contextlib.suppress(ValueError):
            given["allowed_origins"] = tuple(json.loads(origins[0]))
    return ServeOptions(**given)


def _check_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs {', '.join(missing)}; run {sys.executable} -m {install_hint('serve')}"
        )
