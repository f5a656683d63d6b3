"""Whether this machine serves the models that plans mean."""
