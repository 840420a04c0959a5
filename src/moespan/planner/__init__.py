"""What a layout costs, without running it and without torch: memory, traffic, work."""
