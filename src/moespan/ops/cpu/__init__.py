"""Operations for CPUs through kernels of our own."""
