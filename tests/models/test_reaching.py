"""What a folder may not ask for: switches that fetch or run something, whatever stands for yes."""

import pytest

from modhifi_cli.errors import DataError
from modhifi_cli.models import _refuse_reaching


@pytest.mark.parametrize("yes", [True, 1, 1.0, [1], "x"])
@pytest.mark.parametrize("name", ["trust_remote_code", "pretrained", "auto_map", "push_to_hub"])
def test_a_number_that_stands_for_yes_is_refused_like_it(name, yes):
    with pytest.raises(DataError, match=rf"kwargs.config.{name} would fetch, open or run something"):
        _refuse_reaching({"config": {name: yes}}, largest=10)


def test_sizes_by_such_names_open_nothing():
    _refuse_reaching({"pretrained_window_sizes": [0, 0, 12], "trust_remote_code": False, "pretrained": None}, largest=100)
