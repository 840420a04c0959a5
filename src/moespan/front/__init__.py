"""How a user reaches an engine: settings, prompts, the `LLM` class, batches of JSON lines."""
