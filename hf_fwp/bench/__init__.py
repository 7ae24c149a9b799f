"""Timings: `hf-fwp bench ...`. Every number is a ratio to somebody else's code, run in turns in the same process."""
