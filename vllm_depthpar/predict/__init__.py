"""How long a plan takes on a machine, before anything is loaded."""
