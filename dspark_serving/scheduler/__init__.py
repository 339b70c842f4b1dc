"""Decides how many drafted tokens of each request are verified; pure, knows no serving engine."""
