"""How verbs start an engine. Torch and `LLM` are imported only here, when a verb runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moespan.front.settings import Settings

if TYPE_CHECKING:
    from moespan.front.llm import LLM


def start_llm(settings: Settings) -> LLM:
    """A running engine; on a node other than node 0 it serves node 0 and never returns."""
    from moespan.front.llm import LLM

    return LLM.from_settings(settings)


def serve_unless_first_node(settings: Settings) -> None:
    """On a node other than node 0 serve node 0, which reads and writes all files; never return.

    Verbs call it before they look at any file, which only node 0 needs to have.
    """
    if settings.node_rank > 0:
        start_llm(settings)
