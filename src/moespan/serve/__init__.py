"""The HTTP server: OpenAI's routes over an engine. Imported by the verb `serve` only."""
