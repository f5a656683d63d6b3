"""What a worker measures of its model, and how that reaches `/metrics`."""
