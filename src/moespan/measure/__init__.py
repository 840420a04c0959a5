"""Is it right, and how fast is it: comparison with references, and speed beside limits."""
