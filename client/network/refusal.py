"""The answer to a task whose bundle the site has not approved: an error, in the place of silence.

A SuperNode whose task is dropped waits for it, and takes no other. This file runs by itself, beside Flower
and nothing of ours, in the sandbox where the bundle would have run: it reads a message from outside too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

REASONS = {
    "unapproved": (ErrorCode.INVALID_FAB, "this site has not approved the bundle of this run"),
    "failed": (ErrorCode.CLIENT_APP_CRASHED, "the courier of this run ended without an answer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("node")
    parser.add_argument("token_file")
    parser.add_argument("reason", choices=sorted(REASONS))
    parser.add_argument("--root-certificates")
    given = parser.parse_args()
    certificates = Path(given.root_certificates).read_bytes() if given.root_certificates else None
    error = Error(*REASONS[given.reason])
    refuse(given.node, Path(given.token_file).read_text().strip(), error, certificates)


def refuse(node: str, token: str, error: Error, certificates: bytes | None) -> None:
    """Answer the task of ``token`` with ``error``.

    Args:
        node: the SuperNode's runtime API, ``host:port``. certificates: that it is verified by (PEM); None:
            it is on this machine, without TLS.
    """
    client = RuntimeHttpClient.from_server_address(
        server_address=node,
        insecure=certificates is None,
        root_certificates=certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    try:
        message, context, _, _ = pull_task_input(client)
        push_message(client, Message(error, reply_to=message), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        client.close()


if __name__ == "__main__":
    main()
