"""`moespan doctor`: what of this machine would stop a job or slow it down, and the mend."""
