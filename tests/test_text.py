"""Text of others does nothing to a terminal."""

import pytest

from kit.text import in_a_line, printable

HARM = {
    "title": "\x1b]0;title\x07",
    "clipboard": "\x1b]52;c;aGVsbG8=\x07",
    "color": "\x1b[31m",
    "C1": "\x9b31m\x90",
    "carriage return": "safe\rother",
    "backspace": "rm\x08\x08ls",
    "bidirectional": "a\u202eb\u2066c",
    "line separator": "a\u2028b\x85c",
    "half a pair": "a\ud800b",
    "NUL": "a\x00b",
}


@pytest.mark.parametrize("text", HARM.values(), ids=HARM)
def test_what_a_terminal_would_obey_is_made_spaces(text):
    shown = printable(f"é 東 {text}\nnext")
    assert shown.startswith("é 東 ") and shown.endswith("\nnext")
    assert all(c.isprintable() for c in shown.replace("\n", ""))
    assert len(shown) == len(f"é 東 {text}\nnext")
    assert in_a_line(text).isprintable() and "\n" not in in_a_line(f"{text}\n{text}")
