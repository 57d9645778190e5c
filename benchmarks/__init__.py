"""Benchmarks: how fast, in how much memory and how exactly, beside the peers. README.md has the protocol."""
