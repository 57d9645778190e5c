"""A trained run put to use: chat, classification, and how fast it answers. Imported without torch."""
