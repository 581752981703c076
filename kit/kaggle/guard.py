"""Python's sockets reach this machine only, as where there is no network."""

import errno
import ipaddress
import os
import socket
from typing import Any

NETWORK = (socket.AF_INET, socket.AF_INET6)


def install() -> None:
    """Guards every socket of this process that is made from now on.

    Refused are connections, datagrams and look-ups of names, with the errors of a machine that
    is not connected. Libraries that make sockets without Python's are not seen.
    """
    for name, place in {"connect": 0, "connect_ex": 0, "sendto": -1}.items():
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name), place))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, _known(getattr(socket, name)))


def local(host: Any) -> bool:
    """Whether an address or a name is this machine's own."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def _guarded(method: Any, place: int) -> Any:
    """place: of the address among the method's arguments."""

    def refusing(self: socket.socket, *given: Any) -> Any:
        if self.family in NETWORK and not local(given[place][0]):
            if method.__name__ == "connect_ex":
                return errno.ENETUNREACH
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        return method(self, *given)

    return refusing


def _known(function: Any) -> Any:
    """A look-up that knows the names and addresses of this machine only."""

    def refusing(host: Any, *given: Any, **named: Any) -> Any:
        if not local(host):
            reason = "Temporary failure in name resolution"
            raise socket.gaierror(socket.EAI_AGAIN, reason)
        return function(host, *given, **named)

    return refusing
