"""The only package that imports SGLang: entry points, hooks, worker, and what a CPU-only machine needs."""
