"""Use a trained run: chat and classification."""
