"""Bounds on total variation: against densities, brute force and constructions written another way."""

import math

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics import discriminability as disc

NAMES = list(disc.BOUNDS)


def random_pair(d, *, seed=0, batch=40):
    """Means ``[batch, d]`` and covariances ``[batch, d, d]`` of pairs of distributions of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(2):
        root = draw(batch, d, d) * 10 ** draw(batch, 1, 1)
        found += [draw(batch, d), root @ root.mT / d]
    return tuple(found)


def draws(*, images=60, filters=5, d=2, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    features = torch.randn(images, filters, d, generator=generator, dtype=torch.float64)
    return features + 0.7 * labels[:, None, None], labels


def of_samples(p, q):
    """Means and population covariances of two sets of samples ``[n, d]``, by loops' definition."""
    found = []
    for samples in (p, q):
        mean = samples.mean(0)
        found += [mean, (samples - mean).T @ (samples - mean) / len(samples)]
    return tuple(found)


def gaussian_tv(mean_p, var_p, mean_q, var_q):
    """Total variation of two Gaussians on the line by quadrature."""
    reach = 12 * math.sqrt(max(var_p, var_q))
    grid = torch.linspace(min(mean_p, mean_q) - reach, max(mean_p, mean_q) + reach, 100_001, dtype=torch.float64)

    def density(mean, var):
        return torch.exp(-((grid - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)

    return float(torch.trapezoid((density(mean_p, var_p) - density(mean_q, var_q)).abs(), grid) / 2)


def tensors(*values):
    mean_p, var_p, mean_q, var_q = (torch.tensor(value, dtype=torch.float64) for value in values)
    return mean_p.reshape(1), var_p.reshape(1, 1), mean_q.reshape(1), var_q.reshape(1, 1)


# -------------------------------------------------------------------------------------------------------------- moments


def test_class_moments_are_those_of_each_class_alone_and_do_not_depend_on_the_batches():
    features, labels = draws()
    whole = disc.class_moments(features, labels, 4)
    parts = disc.ClassAccumulator(4)
    for part, own in zip(features.float().double().split(7), labels.split(7), strict=True):
        parts.update(part, own)
    split = parts.result()
    assert whole.counts.tolist() == torch.bincount(labels, minlength=4).tolist()
    for cls in range(3):
        own = features[labels == cls]
        torch.testing.assert_close(whole.mean[cls], own.mean(0))
        torch.testing.assert_close(whole.second[cls], torch.einsum("nfi,nfj->fij", own, own) / len(own))
        torch.testing.assert_close(whole.covariance(cls)[2], torch.cov(own[:, 2].T, correction=0))
    torch.testing.assert_close(split.mean, whole.mean, rtol=1e-6, atol=1e-6)  # the parts were rounded to float32
    assert whole.present.tolist() == [0, 1, 2]
    assert not whole.mean[3].any()


def test_the_rest_is_the_mixture_of_all_other_classes():
    features, labels = draws()
    moments = disc.class_moments(features, labels, 3)
    for cls in range(3):
        mean_p, cov_p, mean_q, cov_q = disc.one_against_rest(moments, cls)
        for number in range(5):
            expected = of_samples(features[labels == cls, number], features[labels != cls, number])
            for found, wanted in zip((mean_p, cov_p, mean_q, cov_q), expected, strict=True):
                torch.testing.assert_close(found[number], wanted)
    several = disc.one_against_rest(moments, torch.tensor([2, 0]))
    for found, wanted in zip(several, disc.one_against_rest(moments, 0), strict=True):
        torch.testing.assert_close(found[1], wanted)


def test_two_classes_are_taken_as_they_are():
    features, labels = draws()
    found = disc.between(disc.class_moments(features, labels, 3), 2, 1)
    wanted = of_samples(features[labels == 2, 3], features[labels == 1, 3])
    for part, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(part[3], expected)


# ------------------------------------------------------------------------------------------------------------ witnesses


def test_witnesses_are_the_sums_over_a_filters_map():
    maps = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    sums = disc.spatial_sum(maps)
    torch.testing.assert_close(sums[4, 1], sum(maps[4, 1].flatten().double()))
    torch.testing.assert_close(disc.squared_norm(maps)[4, 1], (maps[4, 1].double() ** 2).sum(), rtol=1e-6, atol=0)
    assert torch.equal(disc.spatial_sum(maps[..., 0, 0]), maps[..., 0, 0].double())
    assert torch.equal(disc.sum_features(sums)[..., 0], sums)
    quadratic = disc.quadratic_features(sums)
    size = sums.square().mean(0).sqrt()
    torch.testing.assert_close(quadratic[..., 0] * size, sums)
    torch.testing.assert_close(quadratic[..., 1] * size**2, sums**2)


def test_the_quadratic_features_scale_changes_no_bound():
    sums, labels = draws(d=1)
    raw = torch.stack([sums[..., 0], sums[..., 0] ** 2], dim=-1)
    for name in NAMES:
        plain, _ = disc.discriminability(disc.class_moments(raw, labels, 3), bound=name)
        scaled, _ = disc.discriminability(
            disc.class_moments(disc.quadratic_features(37.5 * sums[..., 0]), labels, 3), bound=name
        )
        torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-9)


def test_exp_norm_is_published_where_it_fits_and_finite_where_it_would_overflow():
    norms = torch.tensor([[0.1, 3000.0], [0.5, 1e6], [0.9, 40.0]], dtype=torch.float64)
    features = disc.exp_norm_features(norms)[..., 0]
    torch.testing.assert_close(features[:, 0], norms[:, 0].exp())
    torch.testing.assert_close(features[:, 1], (norms[:, 1] / 1e6).exp())
    wide = disc.exp_norm_features(norms, largest=300.0)
    assert torch.isfinite(wide.square()).all()
    torch.testing.assert_close(wide[:, 0, 0], norms[:, 0].exp())
    assert torch.equal(disc.exp_norm_features(torch.zeros(3, 1, dtype=torch.float64)), torch.ones(3, 1, 1).double())


# --------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("d", [1, 2, 4])
def test_bounds_lie_between_0_and_1_and_in_their_order(d):
    pair = random_pair(d, batch=400)
    found = {name: bound(*pair) for name, bound in disc.BOUNDS.items()}
    for values in found.values():
        assert values.shape == (400,) and ((values >= 0) & (values <= 1)).all()
    slack = 1e-15
    assert (found["minimax"] >= found["fisher"] - slack).all()
    assert (found["fisher"] >= found["minimax_published"] - slack).all()
    assert (found["fisher"] >= found["witness"] - slack).all()
    assert torch.equal(found["ensemble"], torch.maximum(found["minimax"], found["fisher"]))
    published = disc.ensemble_bound(*pair, published=True)
    assert torch.equal(published, torch.maximum(found["minimax_published"], found["fisher"]))
    assert (found["minimax"] - found["fisher"]).max() > 0.01, "the tight bound must gain somewhere"


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_minimax_optimum_is_the_maximum_over_directions(d):
    mean_p, cov_p, mean_q, cov_q = pair = random_pair(d, batch=12, seed=3)
    found = disc.minimax_squared(*pair).sqrt()
    for number in range(12):
        delta = mean_p[number] - mean_q[number]

        def quotient(u, number=number, delta=delta):
            p = torch.einsum("...i,ij,...j->...", u, cov_p[number], u).clamp_min(0).sqrt()
            q = torch.einsum("...i,ij,...j->...", u, cov_q[number], u).clamp_min(0).sqrt()
            return (u @ delta).abs() / (p + q)

        generator = torch.Generator().manual_seed(number)
        best = torch.randn(20_000, d, generator=generator, dtype=torch.float64)
        best = best[quotient(best).argmax()]
        for step in range(120):  # a random search that narrows down
            width = 0.85**step * best.norm()
            tries = best + width * torch.randn(200, d, generator=generator, dtype=torch.float64)
            tries = torch.cat([best[None], tries])
            best = tries[quotient(tries).argmax()]
        assert float(found[number]) == pytest.approx(float(quotient(best)), rel=1e-5)
        # What is added to the variances for float64's sake costs an ill-conditioned pair some 1e-9.
        assert float(found[number]) >= float(quotient(best)) * (1 - 1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("p", "q"), [((0, 1), (1, 1)), ((0, 1), (3, 0.2)), ((0, 1), (0, 9)), ((5, 0.01), (5.3, 0.04)), ((-2, 4), (7, 1))]
)
def test_bounds_are_not_above_the_total_variation_of_gaussians(name, p, q):
    true = gaussian_tv(*p, *q)
    assert float(disc.BOUNDS[name](*tensors(*p, *q))) <= true
    moments = disc.ClassMoments(
        torch.tensor([5, 5]),
        torch.tensor([[[float(p[0])]], [[float(q[0])]]], dtype=torch.float64),
        torch.tensor([[[[p[1] + p[0] ** 2.0]]], [[[q[1] + q[0] ** 2.0]]]], dtype=torch.float64),
    )
    assert float(disc.pairwise_tvs(moments)) <= true


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_not_above_the_total_variation_of_discrete_distributions(name):
    generator = torch.Generator().manual_seed(1)
    places = torch.randn(300, 4, 2, generator=generator, dtype=torch.float64) * 3
    p, q = torch.rand(2, 300, 4, generator=generator, dtype=torch.float64).pow(3)
    moments = []
    for mass in (p, q):
        mass /= mass.sum(1, keepdim=True)
        mean = torch.einsum("bn,bni->bi", mass, places)
        away = places - mean[:, None]
        moments += [mean, torch.einsum("bn,bni,bnj->bij", mass, away, away)]
    assert (disc.BOUNDS[name](*moments) <= (p - q).abs().sum(1) / 2 + 1e-9).all()


def test_the_tight_bound_is_reached():
    # Both sides share a point of mass 1 − τ; the rest lies at a and −a: total variation τ, and no bound may say less.
    for share in (0.05, 0.3, 0.8):
        mean, var = 2.0 * share, 4.0 * share * (1 - share)
        pair = tensors(mean, var, -mean, var)
        assert float(disc.minimax_bound(*pair)) == pytest.approx(share, rel=1e-9)
        assert float(disc.fisher_bound(*pair)) == pytest.approx(share, rel=1e-9)
    assert float(disc.minimax_bound(*tensors(1.0, 0.0, 0.0, 1.0))) == pytest.approx(0.5, rel=1e-5)  # √1e-12 is added
    assert float(disc.fisher_bound(*tensors(1.0, 0.0, 0.0, 1.0))) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_units_of_the_features_do_not_matter(name):
    mean_p, cov_p, mean_q, cov_q = pair = random_pair(2, seed=5)
    units = torch.tensor([1e-9, 3e7], dtype=torch.float64)
    scaled = (mean_p * units, cov_p * units[:, None] * units, mean_q * units, cov_q * units[:, None] * units)
    for robust in (0.0, 0.3):
        torch.testing.assert_close(
            disc.BOUNDS[name](*scaled, robust=robust), disc.BOUNDS[name](*pair, robust=robust), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", NAMES)
def test_robust_lowers_every_bound(name):
    pair = random_pair(2, seed=6)
    plain, small, large = (disc.BOUNDS[name](*pair, robust=robust) for robust in (0.0, 0.1, 1.0))
    assert (large < small).all() and (small < plain).all()
    if name == "fisher":
        mean_p, cov_p, mean_q, cov_q = pair
        both = cov_p + cov_q
        both = both + 0.1 * torch.diag_embed(both.diagonal(dim1=1, dim2=2))
        gap = mean_p - mean_q
        distance = torch.einsum("bi,bi->b", gap, torch.linalg.solve(both, gap))
        torch.testing.assert_close(small, distance / (2 + distance))


def test_fisher_is_the_witness_bound_of_the_best_combination_and_constant():
    mean_p, cov_p, mean_q, cov_q = pair = random_pair(2, seed=7, batch=5)
    wanted = disc.fisher_bound(*pair)
    for number in range(5):
        gap = mean_p[number] - mean_q[number]
        u = torch.linalg.solve(cov_p[number] + cov_q[number], gap)
        middle = u @ (mean_p[number] + mean_q[number]) / 2
        p, q = u @ mean_p[number] - middle, u @ mean_q[number] - middle
        found = disc.witness_bound(
            p.reshape(1), (u @ cov_p[number] @ u).reshape(1, 1), q.reshape(1), (u @ cov_q[number] @ u).reshape(1, 1)
        )
        torch.testing.assert_close(found, wanted[number])


@pytest.mark.parametrize("name", NAMES)
def test_singular_covariances_give_sound_bounds(name):
    zero = torch.zeros(2, dtype=torch.float64)
    flat = torch.zeros(2, 2, dtype=torch.float64)
    bound = disc.BOUNDS[name]
    assert float(bound(zero, flat, zero, flat)) == 0, "a dead filter tells nothing apart"
    ones = torch.ones(2, dtype=torch.float64)
    assert float(bound(ones, flat, ones * (1 + 1e-13), flat)) < 1e-6, "rounding is no difference"
    # Constant but different: apart for certain; only D1 as it stands cannot see more than its raw second moments.
    assert float(bound(ones, flat, 3 * ones, flat)) == pytest.approx(0.2 if name == "witness" else 1, abs=1e-5)
    together = torch.ones(2, 2, dtype=torch.float64)  # two features that are one
    one = bound(ones[:1], together[:1, :1], 2 * ones[:1], together[:1, :1])
    two = bound(ones, together, 2 * ones, together)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-9)


def test_bounds_of_few_samples_are_finite_and_true_of_the_samples():
    features, labels = draws(images=7, filters=20, d=2, classes=3)
    moments = disc.class_moments(features, labels, 3)
    for name in NAMES:
        bounds, classes = disc.discriminability(moments, bound=name)
        assert torch.isfinite(bounds).all() and ((bounds >= 0) & (bounds <= 1)).all()
        assert classes.tolist() == moments.present.tolist()


def test_a_filter_that_knows_a_class_is_found_and_an_unknowing_one_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.randn(400, 3, 1, generator=generator, dtype=torch.float64)
    features[:, 1, 0] += 4.0 * (labels == 2)
    moments = disc.class_moments(features, labels, 4)
    for name in NAMES:
        bounds, classes = disc.discriminability(moments, bound=name)
        assert bounds.shape == (4, 3) and classes.tolist() == [0, 1, 2, 3]
        assert divmod(int(bounds.argmax()), 3) == (2, 1)
    assert int(disc.pairwise_tvs(moments).argmax()) == 1


def test_pairwise_tvs_is_the_largest_over_all_pairs():
    features, labels = draws(classes=4, d=2)
    moments = disc.class_moments(features, labels, 4)
    wanted = torch.zeros(5, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            for number in range(5):
                if a == b:
                    continue
                mean_a, cov_a, mean_b, cov_b = of_samples(
                    features[labels == a, number], features[labels == b, number]
                )
                gap = mean_a - mean_b
                distance = gap @ torch.linalg.solve(cov_a + cov_b, gap)
                wanted[number] = max(wanted[number], 1 - math.exp(-float(distance) / 4))
    torch.testing.assert_close(disc.pairwise_tvs(moments), wanted)


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_class_without_images_is_named():
    features, labels = draws()
    moments = disc.class_moments(features, labels, 5, names=("cat", "dog", "frog", "ship", "truck"))
    with pytest.raises(NumericsError, match=r"^class 3 \(ship\) has no images among the 60 given"):
        disc.one_against_rest(moments, 3)
    with pytest.raises(NumericsError, match=r"^class 4 \(truck\) has no images"):
        disc.between(moments, 0, 4)
    with pytest.raises(NumericsError, match="class 9 does not exist: there are 5 classes"):
        disc.one_against_rest(moments, 9)
    with pytest.raises(NumericsError, match="only 0 of 5 classes have at least 50 images .60 images in all."):
        disc.pairwise_tvs(moments, least=50)


def test_a_class_that_is_alone_is_named():
    features, _ = draws()
    moments = disc.class_moments(features, torch.ones(60, dtype=torch.int64), 3)
    with pytest.raises(NumericsError, match="class 1 is the only one with images"):
        disc.one_against_rest(moments, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda features, labels: labels.fill_(7), "conv1: a label is 7, but there are 3 classes"),
        (lambda features, labels: features.fill_(math.nan), "conv1: a feature is NaN or infinite"),
    ],
)
def test_what_cannot_be_summed_is_refused_with_its_place(spoil, message):
    features, labels = draws()
    spoil(features, labels)
    with pytest.raises(NumericsError, match=message):
        disc.class_moments(features, labels, 3, place="conv1")


def test_no_images_at_all_is_an_error():
    with pytest.raises(NumericsError, match="conv1: there are no images to take class statistics from"):
        disc.ClassAccumulator(3, place="conv1").result()
