"""Correctness and speed: comparison with reference logits, and speed beside hardware limits."""
