"""How the wanted sparsity is reached: in one pass over the groups, or in several passes of a smaller share each."""

from modhifi_cli.errors import ConfigError


def geometric(sparsity: float, *, iterations: int) -> tuple[float, ...]:
    """Removed share after each pass, so that every pass removes the same share of what is still there.

    ModHiFi (arXiv:2511.19566) removes 1 to 20 % of the components per iteration in its aggressive regime.

    Args:
        sparsity: Share to be removed in the end, in [0, 1).
        iterations: Number of passes, at least 1.

    Returns:
        Rising shares, ``iterations`` of them, the last equal to `sparsity`.

    Raises:
        ConfigError: If `iterations` is below 1.
    """
    if iterations < 1:
        raise ConfigError(f"schedule.iterations must be at least 1, got {iterations}.")
    return tuple(1.0 - (1.0 - sparsity) ** ((i + 1) / iterations) for i in range(iterations - 1)) + (sparsity,)
