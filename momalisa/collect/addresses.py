"""Which addresses are on the public internet: a collection file is written by others, and must not lead us elsewhere."""

from __future__ import annotations

import ipaddress
import socket

import aiohttp
from aiohttp.abc import ResolveResult

from momalisa.collect.fetched import Ended
from momalisa.records import Reason

EMBEDDING = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")  # IPv4 in the last 32 bits: NAT64, an old form
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215


def is_private(address: str) -> bool:
    """Whether an IP address is not on the public internet. Raises ValueError for what is no IP address."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in LOCAL_NAT64:
            return True
        behind = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if any(ip in network for network in EMBEDDING) else None
        ip = ip.ipv4_mapped or ip.sixtofour or behind or ip
    return not ip.is_global or ip.is_multicast


def private(host: str, address: str) -> Ended:
    """How a URL with a private address ends."""
    return Ended(
        Reason.REFUSED, f"{host} is the private address {address}; collect.allow_private_addresses=true would fetch from it"
    )


class PublicResolver(aiohttp.ThreadedResolver):
    """Names -> public addresses; the address that was judged is the one connected to."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        public = [result for result in found if not is_private(result["host"])]
        if found and not public:
            raise private(host, found[0]["host"])
        return public
