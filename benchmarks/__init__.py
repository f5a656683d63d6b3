"""Measurements that `depthpar bench` does not make; see README.md here."""
