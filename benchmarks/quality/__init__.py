"""What plans cost in quality, and what is won back."""
