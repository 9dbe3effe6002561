"""What writes the parts of `docs/` that are not written by hand. `python -m tools.write` writes them all anew."""
