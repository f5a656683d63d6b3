"""Checkpoint folders: what is in them, and folders that carry a plan."""
