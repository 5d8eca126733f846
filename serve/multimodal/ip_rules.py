"""Rules for the IP addresses that URLs in requests may reach: public ones, and networks that a flag allows.

Addresses are checked as numbers, after the host name (or 2130706433, 0x7f.1, ...) has been resolved. The
connection then goes to the checked address. IPv6 can express IPv4 addresses in several ways: those in use are
checked as their IPv4 address, and the others are refused.
"""

import asyncio
import functools
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Maps a host and a port to addresses. Raises OSError."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv6-only networks reach IPv4 addresses through it (RFC 6052)


RESOLVER_THREADS = 32  # a name server that does not answer keeps a thread for half a minute


@functools.cache
def _resolver_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolve")


async def resolve(host: str, port: int) -> list[str]:
    """Returns a host's addresses from the system's resolver, without duplicates. Raises OSError."""
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_resolver_pool(), look_up)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_allowed(address: str, networks: Iterable[Network]) -> bool:
    """Returns whether an address is public, or lies in one of the allowed networks."""
    target = _effective_address(ipaddress.ip_address(address.partition("%")[0]))
    return _is_public(target) or any(target in network for network in networks)


def _effective_address(address: Address) -> Address:
    """Returns the IPv4 address that an IPv6 address stands for, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address
    return address


def _is_public(address: Address) -> bool:
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    # Retired kinds: site-local addresses, and tunnels, which end at an IPv4 address of the client's choice.
    retired = ("is_site_local", "sixtofour", "teredo")
    return not any(getattr(address, kind, None) for kind in retired)
