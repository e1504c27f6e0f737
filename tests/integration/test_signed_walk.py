"""A whole run whose server knows its members' keys: who does not sign, or signs as another, is not in it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message

from common import wire
from common.plan import Stage
from common.privacy.keys import public_key
from common.wire.signed import sign_reply
from server.collect import Collector
from tests.integration import fake_guard
from tests.integration.consortium import Consortium, answered, recipe, rejected
from tests.integration.consortium import fake_models as fake_models

KEYS = {site: Ed25519PrivateKey.generate() for site in ("a", "b", "c", "d")}
STAGES = {action: stage for stage, action in wire.ACTIONS.items()}
NAMES = ("a", "b", "c", "d")  # of the nodes, in their order


class SigningSites(fake_guard.FakeSites):
    """Each site's guard signs its answers; ``instead``: the site and the key that others sign by."""

    instead: ClassVar[dict[tuple[str, Stage], tuple[str, str] | None]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        order = wire.decode_order(message.content)
        site = NAMES[int(context.node_config["partition-id"])]
        reply = super().__call__(message, context)
        signature = self.instead.get((site, STAGES[message.metadata.message_type]), (site, site))
        if signature is not None:
            sign_reply(reply.content, signature[0], order, KEYS[signature[1]])
        return reply


def test_what_its_site_did_not_sign_is_never_folded(
    fake_models: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = {site: public_key(key) for site, key in KEYS.items() if site != "d"}  # d is no member
    sites = SigningSites()
    monkeypatch.setattr("simulations.loopback.client_app", sites)
    monkeypatch.setattr(
        "server.app.Collector", lambda grid, events, window, *_: Collector(grid, events, window, known)
    )
    monkeypatch.setattr(
        SigningSites,
        "instead",
        {("c", Stage.propose): ("a", "a"), ("b", Stage.adapt): ("b", "a")},
    )
    with pytest.raises(Exception, match=r"run\.min_sites"):
        Consortium(tmp_path / "too-few", recipe(sites=NAMES)).go()
    monkeypatch.setattr(SigningSites, "instead", {("c", Stage.propose): ("a", "a"), ("b", Stage.style): None})
    consortium = Consortium(tmp_path / "enough", recipe(sites=NAMES))
    with pytest.raises(Exception, match="stage style"):  # one of two has answered
        consortium.go()
    state = [event for event in consortium.events() if event["event"] == "refused"]
    assert {str(event["reason"]) for event in state} >= {
        "an answer in the name of a site that did not sign it",
        "a reply signed by a site whose key is not known here",
    }
    monkeypatch.setattr(SigningSites, "instead", {("c", Stage.style): None})
    outcome = Consortium(tmp_path / "whole", recipe(sites=NAMES)).go()
    assert outcome.sites == ["a", "b", "c"]
    assert answered(outcome, "adapt") == ["a", "b", "c"]
    assert rejected(outcome, "style") == {"c": "a reply that nobody signed"}
