"""Models and checkpoints of others: what they gain from the operators here."""
