"""Errors in the words of the functions: what the command line calls ``model.preprocess.size`` is ``preprocess['size']`` here."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from modhifi_cli.errors import ModHiFiError

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Places of the command line → arguments of the functions, the most specific first.
_WORDS = (
    (r"model\.preprocess\.(\w+)=", r"preprocess['\1']="),
    (r"model\.preprocess\.(\w+)", r"preprocess['\1']"),
    (r"model\.preprocess=\{mean: (\[[^]]*\]), std: (\[[^]]*\]), size: (\d+)\}", r"preprocess={'mean': \1, 'std': \2, 'size': \3}"),
    (r"model\.(preprocess|kwargs|classes|factory|tokenizer)\b", r"\1"),
    (r"\b(?:evaluation_)?data\.(?:num_samples|sequences)\b", "num_samples"),
    (r"evaluation_data\.(length|stride)\b", r"\1"),
    (r"data\.(length|labels)\b", r"\1"),
    (r"runtime\.(batch_size|device|seed)\b", r"\1"),
    (r"model\.dtype=float32", "model.float()"),
    (r"data=generated", "synthesize"),
)


def in_words(text: str) -> str:
    """A sentence of the command line with its places as arguments."""
    for pattern, argument in _WORDS:
        text = re.sub(pattern, argument, text)
    return text


def own_words(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function whose errors name its arguments."""

    @functools.wraps(function)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except ModHiFiError as error:
            text = in_words(str(error))
            if text == str(error):
                raise
            raise type(error)(text) from None

    return told
