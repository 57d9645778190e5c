"""`prefopt compare`: methods side by side on the same model, prompts, tokens and steps."""
