"""Whether this machine can show pages: tests of them skip with the reason where it cannot."""

from collections.abc import Sequence

import pytest

from export import Unavailable, _chromium, _npm


def need_browser(packages: Sequence[str] = ("onnxruntime-web", "@huggingface/tokenizers")) -> None:
    """Skip unless Chromium, websockets and packages of npm are here or can be fetched."""
    pytest.importorskip("websockets")
    try:
        _chromium.find()
        for name in packages:
            _npm.package(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
