"""How far `depthpar predict` can be trusted, and what a step is made of."""
