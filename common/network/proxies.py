"""The proxy that the environment names: Flower uses it, but none is asked for this machine itself."""

from __future__ import annotations

import os
from urllib.parse import urlsplit


def loopback_unproxied() -> dict[str, str]:
    """What the environment needs so that no proxy is asked for this machine itself: NO_PROXY, extended."""
    given = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    hosts += [host for host in ("localhost", "127.0.0.1", "::1") if host not in hosts]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))


def proxy_for(host: str) -> tuple[str, int] | None:
    """The proxy between this machine and ``host`` that the environment names, if any."""
    environment = {**os.environ, **loopback_unproxied()}
    proxy = environment.get("HTTPS_PROXY") or environment.get("https_proxy")
    named = [entry.strip().lstrip(".") for entry in environment["NO_PROXY"].split(",")]
    if not proxy or any(entry in ("*", host) or host.endswith(f".{entry}") for entry in named):
        return None
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return (parts.hostname or "", parts.port or 80)
