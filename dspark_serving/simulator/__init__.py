"""Plays workloads of known truth against the very policies that serve."""
