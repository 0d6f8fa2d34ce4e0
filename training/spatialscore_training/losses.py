"""What the model is asked in training, and how far off it is."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import Batch
from .model import Tutor


def _mean(values: Tensor) -> Tensor:
    """Nought of none, as where no two things of a batch touch: torch's mean is not a number there."""
    return values.sum() / max(values.numel(), 1)


def _patchwise(logits: Tensor, kind: Tensor, blank: float) -> tuple[Tensor, Tensor]:
    """Which kind it is, of patches with one [..., kinds + 1], and how often right there; the others, whose class is the
    last, count as `blank` of one."""
    kind = torch.where(kind < 0, logits.shape[-1] - 1, kind).flatten()
    logits, on = logits.flatten(0, -2), kind < logits.shape[-1] - 1
    weight = torch.where(on, 1.0, blank)
    loss = (F.cross_entropy(logits, kind, reduction="none") * weight).sum() / weight.sum()
    return loss, _mean((logits.argmax(-1) == kind)[on].float())


def seeing(visual: Tensor, blocks: list[Tensor], names: Tensor, tutor: Tutor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each visual token: which kind lies under it, by the likeness to the kinds' names, and the whole of its truth;
    of each of its patches: what is seen and what is hidden there."""
    target = tutor.visual_tokens(names, batch.kind, batch.extras)
    classes = torch.cat([names, tutor.ground[None]])
    logits = visual @ classes.T * (12 / visual.shape[-1])
    kind = torch.where(batch.kind < 0, len(names), batch.kind)
    # Most tokens see the ground; those on things count as much together.
    weight = torch.where(batch.kind < 0, 0.3, 1.0)
    weight = weight / weight.sum()
    named = (F.cross_entropy(logits.flatten(0, 1), kind.flatten(), reduction="none") * weight.flatten()).sum()
    whole = ((visual - target).square().mean(-1) * weight).sum()
    on = batch.kind >= 0
    told, true = tutor.told(visual, names, batch.kind)[on], batch.extras[on]
    extras = F.mse_loss(told, true)
    touching = true[:, -1] != 0
    order = told[touching, -1] * true[touching, -1]
    front, front_right = _patchwise(tutor.front_kind(blocks[tutor.FRONT_AFTER]), batch.front, 0.2)
    boxes = F.mse_loss(tutor.box(blocks[tutor.BOXES_AFTER])[batch.front >= 0], batch.boxes[batch.front >= 0])
    shade = F.mse_loss(tutor.shade(blocks[tutor.SHADE_AFTER]).squeeze(-1), 10 * batch.shade)
    near = batch.order != 0
    said = tutor.order(blocks[tutor.ORDER_AFTER])[near].squeeze(-1) * batch.order[near]
    behind, behind_right = _patchwise(tutor.behind_kind(blocks[tutor.BEHIND_AFTER]), batch.behind, 0.05)
    figures = {
        "kinds": (logits.argmax(-1) == kind)[on].float().mean(),
        "seeing": whole,
        "extras": extras,
        "depth": _mean((order > 0).float()),
        "patches": front_right,
        "boxes": boxes,
        "hidden": behind_right,
        "shade": shade / (10 * batch.shade).var(),
        "order": _mean((said > 0).float()),
    }
    return named + whole + 4 * extras + _mean(F.softplus(-2 * order)) + front + 2 * boxes + behind + _mean(F.softplus(-said)) + shade, figures


def reading(hidden: tuple[Tensor, ...], tutor: Tutor, batch: Batch, image_token: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Where each visual token is, where each named thing is, where those of a clause are, and whether it holds."""
    grid = int(batch.kind.shape[1] ** 0.5)
    line = torch.linspace(-1, 1, grid, device=batch.ids.device)
    own = torch.cartesian_prod(line, line).repeat(len(batch.ids), 1)
    places = F.mse_loss(tutor.place(hidden[tutor.PLACES_AFTER][batch.ids == image_token]), own)
    at = hidden[tutor.POINTS_AFTER][batch.mentions[:, 0], batch.mentions[:, 1]]
    there = F.mse_loss(tutor.there(at).squeeze(-1), batch.there.clamp(max=2).float())
    at, one = at[batch.there == 1], batch.there == 1
    pointed, places_told = tutor.point(at), batch.places[one]
    points = F.smooth_l1_loss(pointed, places_told, beta=0.2)
    fronts = F.mse_loss(tutor.front(at).squeeze(-1), batch.fronts[one])
    over = batch.clauses.unbind(1)
    known = batch.things.isfinite()
    found, true = tutor.things(hidden[tutor.THINGS_AFTER][over]).view_as(batch.things)[known], batch.things[known]
    things = F.smooth_l1_loss(found, true, beta=0.2)
    said = tutor.clause(hidden[tutor.CLAUSES_AFTER][over]).squeeze(-1)
    clauses = F.binary_cross_entropy_with_logits(said, batch.clause_kept.float())
    right = ((said > 0) == batch.clause_kept).float()
    figures = {
        "places": places,
        "points": (pointed - places_told).norm(dim=-1).mean(),
        "there": there,
        "fronts": fronts,
        "things": (found - true).abs().mean(),
        "clauses": right.mean(),
        "broken": _mean(right[~batch.clause_kept]),
    }
    return places + 2 * points + fronts + there + 3 * things + clauses, figures


def bradley_terry(better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian form, on rewards [..., 2] of mean and logarithm of sigma, and the share of pairs in right order.

    z ~ N(mean - mean', sigma² + sigma'²), -log sigmoid(z): as in HPSv3, one draw.
    """
    ahead = better[..., 0] - worse[..., 0]
    variance = (2 * better[..., 1]).exp() + (2 * worse[..., 1]).exp()
    z = ahead + variance.sqrt() * torch.randn_like(ahead)
    return -F.logsigmoid(z).mean(), (ahead > 0).float().mean()


def gaussian_bradley_terry(better: Tensor, worse: Tensor, noise: Tensor) -> Tensor:
    """Of each pair, on rewards [B, 2], the mean over draws of z, one for each column of `noise` [B, draws]."""
    ahead = better[:, 0] - worse[:, 0]
    spread = ((2 * better[:, 1]).exp() + (2 * worse[:, 1]).exp()).sqrt()
    return -F.logsigmoid(ahead[:, None] + spread[:, None] * noise).mean(1)


def judging(rewards: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward [B, P, 2]: its mean above nought where the picture keeps the prompt; and, of a picture and its twin
    under one prompt, the right one's above the other's. Sigma is held near one, lest its noise drown all else."""
    mean, log_sigma = rewards.unbind(-1)
    loss = F.binary_cross_entropy_with_logits(mean, batch.kept.float()) + 0.02 * log_sigma.square().mean()
    figures = {"reward": ((mean > 0) == batch.kept).float().mean()}
    if batch.duel:
        first, second, wins = rewards[0::2], rewards[1::2], batch.kept[0::2, :, None]
        ordered, figures["pairs"] = bradley_terry(torch.where(wins, first, second), torch.where(wins, second, first))
        loss = 0.3 * loss + ordered
    return loss, figures
