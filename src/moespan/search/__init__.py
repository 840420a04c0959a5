"""Which layout to take: the real scheduler on predicted times, the search, and its report."""
