"""Winning back what a plan has cost."""
