"""A/B load tests on top of `sglang.benchmark.serving`: its client and datasets; here arms, order and report."""
