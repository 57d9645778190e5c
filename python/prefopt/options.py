"""Options that several commands share. This file imports nothing heavy."""

WHOLE = "none"
QUANTIZATIONS = ("nf4", WHOLE)  # of the base model's weights under an adapter
