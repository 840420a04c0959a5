"""The key between a server and its clients."""

from typing import Final

API_KEY_VARIABLE: Final = "MOESPAN_API_KEY"
"""The environment variable that `serve` and `chat` read it from."""
