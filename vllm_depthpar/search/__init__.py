"""Finding the plan that costs the least quality."""
