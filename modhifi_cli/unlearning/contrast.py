"""Contrast (ours): weights of late layers that keep the retain outputs and move the forget outputs, in closed form."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi_cli.numerics.contrast import Aim, Asked, Group, aim_at
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.numerics.rows import rows_of
from modhifi_cli.records import Statistics
from modhifi_cli.unlearning.method import (
    BETAS,
    Fit,
    LayerEdit,
    Method,
    Site,
    check_depth,
    check_ridge,
    check_shares,
    given_beta,
)


class ContrastU(Method):
    """Weights that keep the retain outputs and move the forget outputs (`numerics.contrast`).

    Args:
        beta: Weight β of the forget samples, or ``"auto"``: the largest tried whose loss of retain accuracy on held-out
            calibration images stays within what is allowed.
        depth: Layers in front of the classifier that are edited.
        ridge: Towards the present weights, times the mean energy of a feature.
        nearest: 0 … 1: whether forget samples go to the retain mean (0) or to the retain class they resemble (1).
        spread: 0 … 1: how much of their own variation they keep.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "beta"
    strengths = BETAS
    edits_classifier = True

    def __init__(
        self,
        *,
        beta: float | str = "auto",
        depth: int = 2,
        ridge: float = 1e-3,
        nearest: float = 0.5,
        spread: float = 0.5,
    ) -> None:
        self.given = given_beta(beta)
        check_depth(depth, least=0, of_least=" (the classifier alone)")
        check_ridge(ridge)
        check_shares(nearest=nearest, spread=spread)
        self.depth, self.ridge = depth, float(ridge)
        self.nearest, self.spread = float(nearest), float(spread)

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        return _ContrastMoments(site, self)


class _ContrastMoments:
    def __init__(self, site: Site, method: ContrastU) -> None:
        self._site, self._method = site, method
        self._moments = {forget: site.moments() for forget in (False, True)}
        # Sums of input maps: of every retain class that a forget sample resembles, of all other retain samples, and of
        # the forget samples that resemble each. Not of every class: a thousand maps of a wide layer fill the memory.
        samples = site.samples
        self._like = samples.resembles[samples.fitted & samples.forget].unique()
        self._sums: Tensor | None = None
        self._counts = torch.zeros(2 * len(self._like) + 1, dtype=torch.float64)

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        samples, positions = self._site.samples, self._site.layer.positions
        if positions is not None:
            inputs = inputs[:, positions.to(inputs.device)]
        for forget, moments in self._moments.items():
            chosen = self._site.fitted(numbers, forget=forget)
            if bool(chosen.any()):
                moments.update(inputs[chosen.to(inputs.device)])
        use = samples.fitted[numbers]
        member = torch.nn.functional.one_hot(self._groups(numbers[use]), len(self._counts)).to(inputs)
        summed = (member.T @ inputs[use.to(inputs.device)].flatten(1)).double().view(-1, *inputs.shape[1:])
        self._sums = summed if self._sums is None else self._sums.add_(summed)
        self._counts += member.sum(0).double().cpu()

    def _groups(self, numbers: Tensor) -> Tensor:
        """Whose sum each image belongs to, ``[batch]`` int64: of a class by its place, the others, of forget samples."""
        samples, count = self._site.samples, len(self._like)
        resembles, forget = samples.resembles[numbers], samples.forget[numbers]
        place = torch.searchsorted(self._like, resembles)
        retain = torch.where(torch.isin(resembles, self._like), place, count)
        return torch.where(forget, count + 1 + place, retain)

    def solve(self, strength: float) -> LayerEdit:
        retain, forget = (self._moments[which].result().statistics for which in (False, True))
        aim, kept = self._aim(forget), None
        if self._site.layer.classifier and strength > 0:
            aim, kept = self._unanswered(aim, retain, forget)
        found, edit = self._site.contrast(Asked(retain, forget, aim, kept), beta=strength, ridge=self._method.ridge)
        return replace(edit, facts={"moved": found.moved, "lost": found.lost, **edit.facts})

    def _unanswered(self, aim: Aim, retain: Statistics, forget: Statistics) -> tuple[Aim, Aim]:
        """Aims of the classifier in which the forget classes' logits are the same for all images.

        They are what retain samples have on average. Kept on the retain samples as they are, these rows would have to
        tell forget samples apart for ever.
        """
        weight, bias = self._site.weight, self._site.bias
        present = Aim(
            weight @ second_moment(retain, centred=False) + torch.outer(bias, retain.mean), weight @ retain.mean + bias
        )
        rows = list(self._site.samples.forget_classes)
        level = present.mean[rows].clone()
        for one, mean in ((aim, forget.mean), (present, retain.mean)):
            one.cross[rows] = torch.outer(level, mean)
            one.mean[rows] = level
        return aim, present

    def _aim(self, forget: Statistics) -> Aim:
        weight, bias = self._site.weight, self._site.bias
        sums, counts, count = self._sums, self._counts.to(weight.device), len(self._like) + 1
        own, theirs = counts[:count], counts[count:]

        def rows(total: Tensor, images: Tensor) -> Tensor:
            return _rows_of(self._site.layer.module, total / images)

        def outputs(rows: Tensor) -> Tensor:
            return weight @ rows + bias[:, None]

        everyone = rows(sums[:count].sum(0), own.sum())
        groups = []
        for number in range(count - 1):
            inputs = rows(sums[count + number], theirs[number])
            # A retain class without samples of its own gives no mean; then all of them stand for it.
            like = rows(sums[number], own[number]) if own[number] else everyone
            groups.append(Group(float(theirs[number] / theirs.sum()), inputs, outputs(like)))
        return aim_at(
            weight,
            bias,
            forget,
            groups,
            retain_outputs=outputs(everyone),
            forget_outputs=outputs(rows(sums[count:].sum(0), theirs.sum())),
            nearest=self._method.nearest,
            spread=self._method.spread,
        )


def _rows_of(module: nn.Module, mean: Tensor) -> Tensor:
    """Rows of one mean input, ``[features, positions]`` float64: unfolding is linear, so a mean map gives mean rows."""
    return rows_of(module, mean[None]).T
