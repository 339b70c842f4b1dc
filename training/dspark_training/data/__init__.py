"""From prompts to conversations as token ids, and from those to padded sequences and blocks."""
