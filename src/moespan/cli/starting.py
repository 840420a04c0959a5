"""Starts an engine for a verb. `LLM` is imported only when a verb runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moespan.front.settings import Settings

if TYPE_CHECKING:
    from moespan.front.llm import LLM


def start_llm(settings: Settings) -> LLM:
    """Start an engine. On nodes other than node 0 this serves node 0 and never returns."""
    from moespan.front.llm import LLM

    return LLM.from_settings(settings)


def serve_unless_first_node(settings: Settings) -> None:
    """On nodes other than node 0, serve node 0 and never return. On node 0, do nothing.

    Only node 0 reads and writes files. So verbs call this function before they look at any file.
    """
    if settings.node_rank > 0:
        start_llm(settings)
