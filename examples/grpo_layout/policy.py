"""The policy: where to put each thing, given the relations that a prompt states; and how GRPO moves it.

A network of one hidden layer, the same for every thing, gives a Gaussian over two numbers for each. A sigmoid makes
them the thing's place on the canvas, from as far left (or up) as it goes to as far right (or down). Gradients are
written out by hand, which keeps the example to numpy.
"""

import numpy as np

RELATIONS = ("left_of", "right_of", "above", "below", "between")
ROLES = tuple((relation, place) for relation in RELATIONS for place in range(3 if relation == "between" else 2))
SIDES = {role: side for side, role in enumerate(ROLES[:8])}
"""The ways to stand to another thing; `right_of` and its like are told apart from `left_of` turned round."""
FEATURES = (2 + len(SIDES)) * len(ROLES)
REACH = 2.5
"""How far from 0 a mean may be: beyond, the sigmoid is flat and nothing more is learned."""
LEAST, MOST = -1.5, 0.5
"""The bounds of the logarithm of sigma: a policy that stopped exploring could learn nothing more."""


def features(clauses: tuple[tuple, ...], things: int) -> np.ndarray:
    """[things, FEATURES]: for each thing, how often it has each role (is the first, the second, of each relation); then
    the same of all others together, and of those alone to which it stands in each of `SIDES`."""
    roles = np.zeros((things, len(ROLES)))
    for relation, *about in clauses:
        for place, thing in enumerate(about):
            roles[thing, ROLES.index((relation, place))] += 1
    beside = np.zeros((things, len(SIDES), len(ROLES)))
    for relation, *about in clauses:
        if len(about) == 2:
            for place, thing in enumerate(about):
                beside[thing, SIDES[relation, place]] += roles[about[1 - place]]
    return np.concatenate([roles, roles.sum(axis=0) - roles, beside.reshape(things, -1)], axis=1)


class Policy:
    """A diagonal Gaussian whose means and logarithms of sigma come from a network, trained by Adam."""

    def __init__(self, seed: int, hidden: int = 48):
        self.rng = np.random.default_rng(seed)
        self.weights = [
            self.rng.normal(0, 0.2, (FEATURES, hidden)),
            np.zeros(hidden),
            self.rng.normal(0, 0.1 / np.sqrt(hidden), (hidden, 4)),
            np.zeros(4),
        ]
        self.steps = 0
        self.moments = [(np.zeros_like(w), np.zeros_like(w)) for w in self.weights]

    def _forward(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rows [n, things, FEATURES]: what the hidden layer says [n * things, hidden], then the means and the
        logarithms of sigma, [n, 2 * things] each."""
        first, first_bias, second, second_bias = self.weights
        hidden = np.tanh(rows.reshape(-1, FEATURES) @ first + first_bias)
        out = (hidden @ second + second_bias).reshape(len(rows), -1, 2, 2)
        mean, log_sigma = (out[:, :, i].reshape(len(rows), -1) for i in (0, 1))
        return hidden, REACH * np.tanh(mean / REACH), np.clip(log_sigma, LEAST, MOST)

    def sample(self, rows: np.ndarray) -> np.ndarray:
        """Actions [n, 2 * things] for rows [n, things, FEATURES]."""
        _, mean, log_sigma = self._forward(rows)
        return mean + np.exp(log_sigma) * self.rng.standard_normal(mean.shape)

    def log_probability(self, rows: np.ndarray, actions: np.ndarray, used: np.ndarray) -> np.ndarray:
        """[n], less the constant. `used` [n, 2 * things] is 1 for the actions of things that are there, else 0."""
        _, mean, log_sigma = self._forward(rows)
        return -(used * (0.5 * ((actions - mean) / np.exp(log_sigma)) ** 2 + log_sigma)).sum(axis=1)

    def divergence(self, reference: "Policy", rows: np.ndarray, used: np.ndarray) -> np.ndarray:
        """[n]: KL(self, reference), exact for Gaussians."""
        (_, mean, log_sigma), (_, mean0, log_sigma0) = self._forward(rows), reference._forward(rows)
        square = (np.exp(2 * log_sigma) + (mean - mean0) ** 2) / np.exp(2 * log_sigma0)
        return (used * (log_sigma0 - log_sigma + 0.5 * (square - 1))).sum(axis=1)

    def train(
        self,
        rows,
        actions,
        used,
        advantages,
        rate: float,
        *,
        epochs: int = 2,
        clip: float = 0.2,
        kl: float = 0.0,
        reference: "Policy | None" = None,
    ) -> None:
        """GRPO's clipped objective on one batch, less `kl` times the divergence from a reference: some steps of ascent
        from the policy that drew it."""
        old = self.log_probability(rows, actions, used)
        for _ in range(epochs):
            ratio = np.exp(self.log_probability(rows, actions, used) - old)
            # Where the ratio is past the clip on the side that the advantage pushes to, the objective is flat.
            flat = np.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
            pulls = np.where(flat, 0, ratio * advantages) / len(rows)
            self._ascend(rows, actions, used, pulls, rate, kl / len(rows), reference)

    def _ascend(
        self, rows, actions, used, pulls: np.ndarray, rate: float, kl: float = 0.0, reference: "Policy | None" = None
    ) -> None:
        """One step of Adam up the sum of pulls [n] times log probabilities, less `kl` times all divergences."""
        hidden, mean, log_sigma = self._forward(rows)
        off = (actions - mean) / np.exp(log_sigma)
        by_mean = pulls[:, None] * off / np.exp(log_sigma)
        by_log_sigma = pulls[:, None] * (off**2 - 1)
        if reference is not None:
            _, mean0, log_sigma0 = reference._forward(rows)
            by_mean -= kl * (mean - mean0) / np.exp(2 * log_sigma0)
            by_log_sigma -= kl * (np.exp(2 * (log_sigma - log_sigma0)) - 1)
        by_mean, by_log_sigma = used * by_mean * (1 - (mean / REACH) ** 2), used * by_log_sigma
        # At a bound sigma may only come back.
        outward = ((log_sigma <= LEAST) & (by_log_sigma < 0)) | ((log_sigma >= MOST) & (by_log_sigma > 0))
        out = np.stack([by_mean, np.where(outward, 0, by_log_sigma)], axis=1).reshape(len(rows), 2, -1, 2)
        out = out.swapaxes(1, 2).reshape(-1, 4)
        back = (out @ self.weights[2].T) * (1 - hidden**2)
        self.steps += 1
        gradients = [rows.reshape(-1, FEATURES).T @ back, back.sum(axis=0), hidden.T @ out, out.sum(axis=0)]
        for weight, gradient, (first, second) in zip(self.weights, gradients, self.moments):
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient**2 - second)
            step = (first / (1 - 0.9**self.steps)) / (np.sqrt(second / (1 - 0.99**self.steps)) + 1e-8)
            weight += rate * step
