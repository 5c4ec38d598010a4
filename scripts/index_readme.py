"""The README as a package index shows it: links into the source tree made whole, for an index has no files beside it.

A metadata hook of hatchling. Pages become links below the project's Source, pictures below its Files (pyproject.toml has
both, once); what stands there already with its scheme stays.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def for_an_index(text: str, urls: Mapping[str, str]) -> str:
    """Markdown with every relative target below the URL where it can be read."""

    def whole(found: re.Match[str]) -> str:
        target = found["target"]
        if not re.match(r"\w+:|#", target):
            target = f"{urls['Files' if found['picture'] else 'Source']}/{target}"
        return f"{found['picture']}[{found['text']}]({target})"

    return _LINK.sub(whole, text)


class ReadmeHook(MetadataHookInterface):
    """Puts the README into the metadata of a wheel or sdist."""

    def update(self, metadata: dict[str, Any]) -> None:
        """As hatchling calls it."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, metadata["urls"])}
