"""Drafters in plain torch, without a KV cache: what is trained, and what serving is compared with."""
