"""When BCO's shift makes training unstable, and what prevents it, measured on a tiny policy (docs/bco-stability.md)."""
