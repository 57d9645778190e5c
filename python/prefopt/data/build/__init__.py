"""Build a data set: read or download sources, convert, filter, split, and write it with a manifest."""
