"""Training of drafters: one process from a target model to a served bundle, no feature cache."""
