"""Two hosts out of network namespaces, and what runs across them."""
