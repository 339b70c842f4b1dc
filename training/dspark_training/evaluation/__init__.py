"""What a drafter is worth: accepted lengths and confidence quality."""
