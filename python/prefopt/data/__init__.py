"""Preference data: from rows on disk to the tensors of a micro-batch."""
