"""The facts of this machine, and the device, cores, memory and environment of its ranks."""
