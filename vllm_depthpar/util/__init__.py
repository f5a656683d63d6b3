"""What knows nothing of plans and models."""
