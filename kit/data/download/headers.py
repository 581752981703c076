"""What a server's answer says about a file: which version of it, how long, and where it begins."""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse


@dataclass(frozen=True)
class Version:
    """Which file a part is of."""

    url: str
    tag: str  # what If-Range names: a strong ETag or a time; empty: none, no going on
    size: int  # of the whole file; -1: the server did not say


def version(url: str, answer: HTTPResponse) -> Version:
    size = length(answer)
    tag = answer.headers.get("ETag", "")
    if not tag.startswith('"'):  # a weak one says nothing about bytes
        tag = answer.headers.get("Last-Modified", "")
    return Version(url, tag, -1 if size is None else size)


def length(answer: HTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    told = text.isdecimal() and len(text) < 20 and not answer.chunked
    return int(text) if told else None


def follows(answer: HTTPResponse, of: Version, have: int) -> bool:
    """Whether a partial answer is the rest of that version from byte `have` on."""
    tag = answer.headers.get("ETag", "")
    other = tag.startswith('"') and of.tag.startswith('"') and tag != of.tag
    span, _, size = answer.headers.get("Content-Range", "").partition("/")
    begins = span.startswith(f"bytes {have}-")
    return begins and not other and size in ("*", str(of.size))


def asked_wait(text: str | None) -> float:
    """Seconds that a Retry-After asks for."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
