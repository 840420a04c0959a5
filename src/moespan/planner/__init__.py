"""The costs of a layout, without running it and without torch: memory, traffic and work."""
