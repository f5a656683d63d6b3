"""Measuring: plans side by side on this machine, in rounds."""
