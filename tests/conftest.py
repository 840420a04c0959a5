"""Settings of all tests: one thread each, and the same random examples every time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from moespan import log

# Before anything imports torch, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Triton: its kernels then run on the CPU, and take part wherever it is.
os.environ["TRITON_INTERPRET"] = "1"

# Messages go to stderr, where tests look for them, as in our own programs.
log.set_up()

settings.register_profile(
    "moespan",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("moespan")
