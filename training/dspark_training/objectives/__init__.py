"""What a drafter is trained for: blocks of the DSpark and DFlash families, chains of Eagle3."""
