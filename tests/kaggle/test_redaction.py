"""A key is found however a server writes it; other text stays as it is."""

import base64
from urllib.parse import quote

import pytest

from kit.kaggle.redaction import find_forms, redact

KEY = "5ecre7-key/0123456789abcdef"
PAIR = f"alice:{KEY}".encode()
FORMS = find_forms({KEY, base64.b64encode(PAIR).decode()})
WRITTEN = {
    "as it is": KEY,
    "in capitals": KEY.upper(),
    "twice": KEY + KEY,
    "URL": quote(KEY, safe=""),
    "URL, twice": quote(quote(KEY, safe=""), safe=""),
    "every letter": "".join(f"%{ord(c):02X}" for c in KEY),
    "JSON": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "hexadecimal": KEY.encode().hex(),
    "header": f"Basic {base64.b64encode(PAIR).decode()}",
    "header in a URL": quote(base64.b64encode(PAIR).decode(), safe=""),
    "lines": f"{KEY[:7]}\n{KEY[7:]}",
    "lines of a log": f"{KEY[:7]}\r\n   {KEY[7:]}",
    "lines in JSON": f"{KEY[:7]}\\n{KEY[7:]}",
    "base64 in lines": "\n".join(base64.encodebytes(PAIR * 9).decode().split()),
    "escapes": f"{KEY[:7]}\x1b\x00{KEY[7:]}",
    "invisible": "\u200b".join(KEY),
    **{
        f"base64 after {n}": base64.b64encode(b"x" * n + KEY.encode() + b"yz").decode()
        for n in range(7)
    },
    **{
        f"of URLs after {n}": base64.urlsafe_b64encode(b"\xff" * n + PAIR).decode()
        for n in range(3)
    },
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_a_key_is_redacted_however_it_is_written(written):
    shown = redact(f"é told {written} and more", FORMS)
    assert shown.startswith("é told ") and shown.endswith(" and more")
    assert "***" in shown and len(shown) < 45
    assert KEY[:6] not in shown.lower()


def test_other_text_is_left_as_it_is():
    text = "İ epoch 5\tloss 0.5e-7 %41 \\n key/0123 alice: 5ecre7\n" * 9
    assert redact(text, FORMS) == text
    assert redact(text, find_forms([])) == text


def test_a_short_secret_is_found_as_it_is_only():
    forms = find_forms({"abc"})
    assert redact("abc " + b"abc".hex(), forms) == "*** 616263"
