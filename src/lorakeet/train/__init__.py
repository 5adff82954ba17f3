"""Training: one exact optimiser step, repeated, watched, stopped and resumed."""
