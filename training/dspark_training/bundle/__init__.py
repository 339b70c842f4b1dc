"""A finished drafter as a directory that serves."""
