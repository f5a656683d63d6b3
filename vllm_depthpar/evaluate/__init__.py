"""What plans cost in quality: perplexity, KL, tasks; and the texts for it."""
