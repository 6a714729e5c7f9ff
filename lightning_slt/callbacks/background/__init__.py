"""Firings beside training: snapshots go to processes of their own, and results come back (docs/background.md)."""
