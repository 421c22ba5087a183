"""The file of the page on `/`: what it lets run, what it names, and its colours."""

from __future__ import annotations

import re

import pytest

from transllm_jax.serving.page import page, policy


def test_only_the_script_and_the_style_of_the_file_may_run() -> None:
    html, headers = page().html.decode(), page().headers
    assert headers["Content-Security-Policy"] == policy(html)
    assert "default-src 'none'" in policy(html) and "unsafe" not in policy(html)
    assert policy(html.replace("</script>", " </script>")) != policy(html)
    # What the policy would refuse in silence.
    assert not re.search(r"<[^>]*\s(style|on\w+)=", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL))
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html


def test_the_page_names_no_other_address() -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^'\"\s]*", page().html.decode()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a format, which is not fetched


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out(theme: int) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3), and of 3 for the edges of fields (1.4.11)."""
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", page().html.decode())
    colours = {name: pair[theme] for name, *pair in found}

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(colours[first]), luminance(colours[second])))
        return (high + 0.05) / (low + 0.05)

    for ink in ("ink", "muted", "accent"):
        for ground in ("page", "card", "tint", "code"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    for ink, ground in (("on-accent", "accent"), ("bad", "bad-tint"), ("ink", "bad-tint")):
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert contrast("edge", "card") >= 3 and contrast("edge", "page") >= 3
