"""The names by which the other rooms use the settings; what they are is said in the files they come from."""

from modhifi_cli.settings.compose import (
    compose,
    for_network,
    job_facts,
    launcher,
    preset_names,
    run_hydra,
    settings,
    steps,
)
from modhifi_cli.settings.explain import explain
from modhifi_cli.settings.foreign import refuse_reaching
from modhifi_cli.settings.heard import check_foreign_folder, check_words
from modhifi_cli.settings.help import main_help, verb_help
from modhifi_cli.settings.targets import PACKAGE, build
from modhifi_cli.settings.words import (
    differences,
    from_yaml,
    slug,
    spell,
    spelled,
    to_yaml,
)
from modhifi_cli.settings.yamls import (
    config_directory,
    groups,
    header,
    top_level_keys,
    verbs,
)

__all__ = [
    "PACKAGE", "build", "check_foreign_folder", "check_words", "compose", "config_directory", "differences", "explain",
    "for_network", "from_yaml", "groups", "header", "job_facts", "launcher", "main_help", "preset_names", "refuse_reaching",
    "run_hydra", "settings", "slug", "spell", "spelled", "steps", "to_yaml",
    "top_level_keys", "verb_help", "verbs",
]  # fmt: skip
