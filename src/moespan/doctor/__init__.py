"""`moespan doctor`: finds what would stop or slow a job on this machine, and the fix."""
