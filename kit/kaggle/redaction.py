"""Credentials -> the same text without them, however a server that echoes them wrote them."""

import base64
import re
from bisect import bisect_right
from collections.abc import Collection
from string import ascii_lowercase, ascii_uppercase

SHORT = 8  # letters; of shorter secrets other forms would be found in common words
_SMALL = str.maketrans(ascii_uppercase, ascii_lowercase)  # as long as before
# a letter as URLs (perhaps twice), JSON and HTML quote it
_QUOTED = re.compile(
    r"(?:%(?:25)*|\\u00|\\x|&#x0*)(?P<hex>[0-9a-f]{2});?|&#0*(?P<number>\d{2,3});",
    re.IGNORECASE,
)
# what may stand between two letters: line ends, also those of JSON and quoted-printable
_BROKEN = re.compile(r"\\[nrt]|=\r?\n|[^!-~]+|" + _QUOTED.pattern, re.IGNORECASE)


def find_forms(secrets: Collection[str]) -> list[str]:
    """The secrets as they are, in base64 and in hexadecimal, in small letters; longest first."""
    forms = {form.lower() for secret in secrets for form in _forms(secret)}
    return sorted(forms, key=len, reverse=True)


def redact(text: str, forms: Collection[str]) -> str:
    """The text with *** for every form, also where it is quoted or broken by line ends."""
    letters, before = [], 0
    starts, origins = [], []  # where pieces of `plain` begin, there and in the text
    length = 0
    for broken in _BROKEN.finditer(text):
        code = int(broken["hex"] or "0", 16) or int(broken["number"] or 0)
        pieces = (text[before : broken.start()], before), (chr(code), broken.start())
        for piece, origin in pieces if code else pieces[:1]:
            starts.append(length)
            origins.append(origin)
            letters.append(piece)
            length += len(piece)
        before = broken.end()
    starts.append(length)
    origins.append(before)
    plain = "".join([*letters, text[before:]]).translate(_SMALL)

    def origin(at: int) -> int:
        piece = bisect_right(starts, at) - 1
        return origins[piece] + at - starts[piece]

    spans = []
    for form in forms:
        at = plain.find(form)
        while at >= 0:
            end = at + len(form)
            last = origin(end - 1)
            quoted = _QUOTED.match(text, last)
            spans.append((origin(at), quoted.end() if quoted else last + 1))
            at = plain.find(form, end)
    redacted, done = [], 0
    for start, end in sorted(spans):
        if start >= done:
            redacted += [text[done:start], "***"]
        done = max(done, end)
    return "".join([*redacted, text[done:]])


def _forms(secret: str) -> list[str]:
    forms = ["".join(secret.split())]
    if len(secret) < SHORT:
        return forms
    data = secret.encode()
    forms.append(data.hex())
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):  # where it begins in a longer text that is encoded
            text = encode(bytes(before) + data).decode().rstrip("=")
            whole = text[:-1] if (before + len(data)) % 3 else text
            forms.append(whole[(0, 2, 3)[before] :])
    return forms
