"""What a validation says: how often the better picture is above, and whether the model knows when it is not."""

from math import erf, exp, log, sqrt

BINS = 10


def interval(right: float, count: int) -> dict[str, float | int]:
    """A share and its 95 % interval by Wilson's score."""
    share, z2 = right / count, 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return {"accuracy": share, "low": middle - half, "high": middle + half, "pairs": count}


def probability(better: tuple[float, float], worse: tuple[float, float]) -> float:
    """Of the first being above the second, of mean and logarithm of sigma each."""
    spread = sqrt(sum(exp(2 * max(-40.0, min(40.0, log_sigma))) for _, log_sigma in (better, worse)))
    return 0.5 * (1 + erf((better[0] - worse[0]) / spread / sqrt(2)))


def judge(rewards: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, float]:
    """Of pairs of rewards, the better picture's first: pair accuracy (a tie is half right), the negative logarithm of the
    probability that the model gave to the right order, and the expected calibration error: over bins of how sure it was,
    how far that lies from how often it was right."""
    right = [(1 + (a[0] > b[0]) - (a[0] < b[0])) / 2 for a, b in rewards]
    chance = [probability(a, b) for a, b in rewards]
    sure = [max(p, 1 - p) for p in chance]
    error = 0.0
    for number in range(BINS):
        inside = [i for i, p in enumerate(sure) if min(int((p - 0.5) * 2 * BINS), BINS - 1) == number]
        if inside:
            error += abs(sum(sure[i] for i in inside) - sum(right[i] for i in inside)) / len(rewards)
    found = interval(sum(right), len(right))
    return found | {"nll": -sum(log(max(p, 1e-12)) for p in chance) / len(chance), "calibration_error": error}
