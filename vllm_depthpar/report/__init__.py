"""One page of what was measured of plans: self-contained HTML."""
