"""What this machine is, and what a rank on it gets: cores, memory, interfaces, environment."""
