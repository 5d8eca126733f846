"""Which addresses a URL in a request may lead to: the internet's, and no others unless allowed.

An address is judged as a number, after the host's name (or 2130706433, 0x7f.1, ...) has been resolved, and what is judged is what
is connected to. IPv6 has several ways to say an IPv4 address: those in use are judged as what they stand for, others refused.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""From a host and a port to addresses. Raises OSError."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how an IPv6-only network reaches IPv4 addresses (RFC 6052)


async def resolve(host: str, port: int) -> list[str]:
    """The system's answer."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in found))


def allowed(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address is the internet's, or in one of the networks that are allowed besides."""
    target = _target(ipaddress.ip_address(address.partition("%")[0]))
    return _public(target) or any(target in network for network in networks)


def _target(address: Address) -> Address:
    """What a connection reaches: the IPv4 address where an IPv6 one stands for it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address
    return address


def _public(address: Address) -> bool:
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    # Retired kinds of IPv6 that no site uses: site-local ones, and tunnels, which end at an IPv4 address of the client's choice.
    retired = ("is_site_local", "sixtofour", "teredo")
    return not any(getattr(address, kind, None) for kind in retired)
