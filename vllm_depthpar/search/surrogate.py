"""What tiles cost when they stand together, learned from plans that were measured.

A plan's divergence is modelled as the sum of its tiles' costs. Alone, each tile's cost can be
measured; beside others it is another, and the more of the model is changed the more so. Bayesian
linear regression keeps what was measured alone as its prior, and corrects it by every plan
measured since, those of a length near the one in question first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_depthpar.search.tiling import Tile, Tiling

# How far a tile's cost in context is expected to be from its cost alone (a factor), and a measured
# divergence from the best sum (a share of it).
_PRIOR_SPREAD = 0.5
_MISFIT = 0.05
# A plan this many lengths away says about as much as one with twice the misfit.
_NEAR = 2.0


class Surrogate:
    """A posterior over tile costs near one length.

    Args:
        alone: each tile's cost by itself, nats per token; tiles that change nothing cost 0.
        measured: plans (their tiles that change something) and their divergence.
        distance: how far each measured plan's length is from the one in question, in layers.
    """

    def __init__(
        self,
        alone: Mapping[Tile, float],
        measured: Sequence[tuple[Tiling, float]],
        distance: Sequence[float],
    ) -> None:
        self._free = [tile for tile in alone if not tile.changes]
        self._tiles = [tile for tile in alone if tile.changes]
        prior = np.array([alone[tile] for tile in self._tiles])
        spread = _PRIOR_SPREAD * np.maximum(prior, 1e-3)
        column = {tile: index for index, tile in enumerate(self._tiles)}
        rows = np.zeros((len(measured), len(self._tiles)))
        for row, (tiling, _) in enumerate(measured):
            rows[row, [column[tile] for tile in tiling]] = 1
        values = np.array([value for _, value in measured])
        noise = np.maximum(_MISFIT * values, 1e-3) * 2 ** (np.asarray(distance) / _NEAR)
        # Gaussian conditioning: one equation per measured plan.
        gain = rows * spread**2
        system = gain @ rows.T + np.diag(noise**2)
        solved = np.linalg.solve(system, np.column_stack([values - rows @ prior, gain]))
        self._mean = prior + gain.T @ solved[:, 0]
        covariance = np.diag(spread**2) - gain.T @ solved[:, 1:]
        # Symmetric but for rounding; eigenvalues below zero are rounding, too.
        eigenvalues, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        self._root = vectors * np.sqrt(np.maximum(eigenvalues, 0))

    def mean(self) -> dict[Tile, float]:
        """List the expected cost of every tile."""
        return self._named(self._mean)

    def sample(self, random: np.random.Generator) -> dict[Tile, float]:
        """Draw costs from the posterior (Thompson sampling)."""
        return self._named(self._mean + self._root @ random.standard_normal(len(self._tiles)))

    def _named(self, costs: npt.NDArray[np.float64]) -> dict[Tile, float]:
        return {
            **dict.fromkeys(self._free, 0.0),
            **dict(zip(self._tiles, costs.tolist(), strict=True)),
        }
