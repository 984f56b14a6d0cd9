"""Mathematics that passes put in place of what a model computes; no knowledge of any model is in here."""
