"""The configuration of nginx, which is all that a hospital can reach: an exact list of Flower's fleet verbs.

Flower 1.41 serves its control API, which has no authentication, and its documentation on the same port as
the fleet's. So it listens on loopback alone, and what is not listed here does not exist outside: who holds
the authority's certificate, which is public, can neither register a node nor start a run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.network.documents import bracketed

# What a SuperNode with a key of its own calls, and no more: it neither registers nor unregisters itself.
FLEET_VERBS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
_PATH = re.compile(r"[\w./@+,= -]+")


@dataclass(frozen=True)
class Proxy:
    """What the configuration is made from.

    Attributes:
        folder: nginx's own, for its logs and its process id.
        server, loopback_ca: the stem of the public server's key and certificate, the authority's certificate.
        listen: (address, port) that hospitals reach. upstream_port: the SuperLink's, on loopback.
        body_mb: of one request; Flower's largest is a little more than 5 MiB.
    """

    folder: Path
    server: Path
    loopback_ca: Path
    listen: tuple[str, int]
    upstream_port: int
    body_mb: int


def nginx_conf(proxy: Proxy) -> str:
    """The configuration's text.

    Guarantees: only `FLEET_VERBS`, only by POST, and under paths that are rebuilt from the verb; no body is
    kept on disk; no log line has a header, so none has a node's signature.

    Raises ``ConfigError`` if a path could be read as something else.
    """
    return f"""\
# Made by wardround consortium serve, which replaces it at each start.
worker_processes auto;
pid "{_quoted(proxy.folder)}/nginx.pid";
error_log "{_quoted(proxy.folder)}/error.log" warn;
events {{ worker_connections 1024; }}
http {{
  server_tokens off;
  default_type application/octet-stream;
{_log(_quoted(proxy.folder))}
  upstream superlink {{ server 127.0.0.1:{proxy.upstream_port}; keepalive 16; }}
  server {{
    listen {bracketed(proxy.listen[0])}:{proxy.listen[1]} ssl;
    ssl_certificate "{_quoted(proxy.server)}.crt";
    ssl_certificate_key "{_quoted(proxy.server)}.key";
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets off;
    keepalive_timeout 75s;
    client_max_body_size {proxy.body_mb}m;
    client_body_buffer_size 64k;
{_verbs(_quoted(proxy.loopback_ca))}
    location / {{ return 404; }}
  }}
}}
"""


def _log(folder: str) -> str:
    """Where nginx writes: one line a request that says something, and nothing of a body."""
    return f"""\
  client_body_temp_path "{folder}/temp/body";
  proxy_temp_path "{folder}/temp/proxy";
  fastcgi_temp_path "{folder}/temp/fastcgi";
  uwsgi_temp_path "{folder}/temp/uwsgi";
  scgi_temp_path "{folder}/temp/scgi";

  # A node signs nothing but a timestamp: who reads its headers can speak for it for five minutes. None is
  # logged. A node asks every three seconds whether there is work; that it was answered is not worth a line.
  log_format audit '$time_iso8601 $remote_addr "$request" $status in=$request_length out=$bytes_sent '
                   'seconds=$request_time';
  map "$status $uri" $told {{
    default 1;
    "200 /v1/fleet/pull-messages" 0;
    "200 /v1/fleet/send-node-heartbeat" 0;
  }}
  access_log "{folder}/access.log" audit if=$told;
"""


def _verbs(loopback_ca: str) -> str:
    """The one way through, made anew from the verb: what a stranger wrote never reaches the SuperLink."""
    return f"""
    location ~ ^/v1/fleet/({"|".join(FLEET_VERBS)})$ {{
      limit_except POST {{ deny all; }}
      proxy_pass https://superlink/v1/fleet/$1;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host localhost;
      proxy_ssl_trusted_certificate "{loopback_ca}";
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_server_name on;
      proxy_connect_timeout 5s;
      proxy_read_timeout 60s;
      proxy_send_timeout 60s;
      proxy_next_upstream off;
      # A body is a model update: it passes through memory and is never a file.
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_max_temp_file_size 0;
    }}"""


def _quoted(path: Path) -> str:
    text = str(path)
    if not _PATH.fullmatch(text):
        raise ConfigError(
            f"{text}: nginx may misread this path; use a folder named with letters, digits and . _ - @ + , ="
        )
    return text
