"""Ranks started, watched and talked to: the front's client, the agent, and the ranks' program."""
