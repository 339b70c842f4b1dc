"""Online speculative decoding with DSpark drafters, as a plugin of SGLang."""

from __future__ import annotations

__version__ = "0.1.0"
