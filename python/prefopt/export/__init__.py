"""A trained run as something else: an adapter to publish, merged weights, 4-bit weights, a GGUF file."""
