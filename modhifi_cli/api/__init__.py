"""The method from Python: a network and batches go in, a network and a record come out; no files, no printing.

The functions are what the verbs of the command line do with the same words: presets are the same YAML files, and the
tasks are the same. Networks that are given are left as they were, unless ``in_place=True`` asks for the opposite.
"""

from modhifi_cli.api.forgetting import audit, unlearn
from modhifi_cli.api.making import synthesize
from modhifi_cli.api.measuring import compare, evaluate
from modhifi_cli.api.pruning import groups, prune, score
from modhifi_cli.api.results import Audited, Compared, Measured, Pruned, Unlearned
from modhifi_cli.api.saving import load_model, save

__all__ = [
    "Audited", "Compared", "Measured", "Pruned", "Unlearned", "audit", "compare", "evaluate", "groups", "load_model",
    "prune", "save", "score", "synthesize", "unlearn",
]  # fmt: skip
