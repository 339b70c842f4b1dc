"""What the frozen target says about a conversation, behind one interface."""
