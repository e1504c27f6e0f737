"""One exit: patient data leaves a hospital only through `client.egress`, and nothing goes round it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from common.guard_api import GuardApi
from tests.architecture.sources import ROOT, imports_of, modules, name_of, tree_of

HOSPITAL = [path for path in modules() if path.is_relative_to(ROOT / "client")]
VERBS = sorted(name for name in vars(GuardApi) if not name.startswith("_"))
RELEASES = {"release_update", "release_numbers"}

# Whatever can talk to another process or machine. Flower is the courier's, and only the courier's.
# fmt: off
TALKERS = {
    "aiohttp", "asyncio", "ctypes", "ftplib", "grpc", "http", "httpx", "huggingface_hub", "imaplib",
    "multiprocessing", "poplib", "ray", "requests", "smtplib", "socket", "socketserver", "ssl", "subprocess",
    "telnetlib", "urllib", "urllib3", "websockets", "xmlrpc", "zmq",
}
# fmt: on


def test_the_hospitals_modules_were_found() -> None:
    assert {"client.app", "client.guard", "client.egress", "client.data"} <= {
        name_of(path) for path in HOSPITAL
    }
    assert len(VERBS) == 7


# What starts other programs or speaks to the SuperNode, and what of that each may use. It holds no data.
OUTSIDE = {
    "client.app": {"flwr"},
    "client.network.executor": {"flwr", "subprocess"},
    "client.network.refusal": {"flwr"},
    "client.network.task": {"subprocess"},
}


@pytest.mark.parametrize("path", HOSPITAL, ids=name_of)
def test_a_hospitals_module_talks_to_nobody(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots & (TALKERS | {"flwr"}) <= OUTSIDE.get(name_of(path), set())


@pytest.mark.parametrize("module", [name for name in OUTSIDE if name.startswith("client.network.")])
def test_what_starts_other_peoples_code_has_nothing_of_the_sites_in_its_hands(module: str) -> None:
    ours = {
        name for name in imports_of(ROOT / f"{module.replace('.', '/')}.py") if name.startswith("client.")
    }
    assert all(name.startswith("client.network") for name in ours)


def test_a_hospital_starts_programs_and_greets_coordinators_in_one_place() -> None:
    """What may talk lies in `common.network`; of the hospital's modules the node's alone reaches for it."""
    talking = {"common.network.children", "common.network.handshake"}
    assert {name_of(path) for path in HOSPITAL if imports_of(path) & talking} == {"client.network.node"}


def test_the_courier_sees_no_image() -> None:
    """It reaches a site through the guard's contract: no module of the site's own but the fault codes."""
    ours = {name for name in imports_of(ROOT / "client" / "app.py") if name.split(".")[0] == "client"}
    assert {".".join(name.split(".")[:2]) for name in ours} == {"client.faults"}
    faults = {name for name in imports_of(ROOT / "client" / "faults.py") if name.split(".")[0] == "client"}
    assert not faults


def test_only_the_guard_and_the_release_gate_hold_the_exit() -> None:
    """The guard for messages; the gate for files that the hospital's own people take out."""
    holders = {name_of(path) for path in HOSPITAL if "client.egress" in imports_of(path)}
    assert holders == {"client.guard", "client.curation.release"}


def test_of_the_exit_the_release_gate_has_the_parcel_alone_and_the_guard_not() -> None:
    assert from_the_exit("client/curation/release.py") == {"Parcel", "Receipt", "release_parcel"}
    assert from_the_exit("client/guard.py") == {"Egress", "Noised"}


def from_the_exit(file: str) -> set[str]:
    imports = [node for node in ast.walk(tree_of(ROOT / file)) if isinstance(node, ast.ImportFrom)]
    return {name.name for node in imports if node.module == "client.egress" for name in node.names}


def test_only_what_trains_and_measures_handles_personal_adapters() -> None:
    """The guard, which answers, never has one in its hands."""
    holders = {name_of(path) for path in modules() if "client.personal" in imports_of(path)}
    assert holders == {"client.measuring", "client.teachers", "client.workshop"}


def guard_methods() -> dict[str, ast.FunctionDef]:
    body = tree_of(ROOT / "client" / "guard.py").body
    guard = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == "Guard")
    return {node.name: node for node in guard.body if isinstance(node, ast.FunctionDef)}


def calls(node: ast.AST, names: set[str]) -> list[ast.Call]:
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in names
    ]


def releasing_methods(methods: dict[str, ast.FunctionDef]) -> set[str]:
    """The releases themselves, and the guard's own methods that end in one."""
    ending = {
        name for name, method in methods.items() if name not in VERBS and returns_released(method, RELEASES)
    }
    return RELEASES | ending


def returns_released(method: ast.FunctionDef, releases: set[str]) -> bool:
    """Whether the one return is the last statement and gives what a release returned, or was given before."""
    returns = [node for node in ast.walk(method) if isinstance(node, ast.Return)]
    last = method.body[-1]
    if returns != [last] or not isinstance(last, ast.Return) or last.value is None:
        return False
    if calls(last.value, releases):
        return True
    if not isinstance(last.value, ast.Name):
        return False
    # A statement of the body itself: one inside an `if` might not be reached.
    before = [
        call for node in method.body[:-1] if isinstance(node, ast.Expr) for call in calls(node, releases)
    ]
    given = {name.id for call in before for name in ast.walk(call) if isinstance(name, ast.Name)}
    return last.value.id in given


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_guard_ends_in_a_release(verb: str) -> None:
    methods = guard_methods()
    assert returns_released(methods[verb], releasing_methods(methods))


def test_the_guard_has_no_other_public_verb() -> None:
    assert {name for name in guard_methods() if not name.startswith("_")} == set(VERBS)


@pytest.mark.parametrize(
    ("body", "released"),
    [
        ("return self._egress(plan).release_numbers(stage, 0, 'x', answer)", True),
        ("self._egress(plan).release_numbers(stage, 0, 'x', asdict(answer))\n    return answer", True),
        ("return answer", False),
        ("self._egress(plan).release_numbers(stage, 0, 'x', other)\n    return answer", False),
        (
            "if quick:\n        return answer\n    return self._egress(plan).release_update(answer)",
            False,
        ),
        ("if plan:\n        self._egress(plan).release_update(stage, 0, answer)\n    return answer", False),
    ],
)
def test_the_check_itself_tells_a_release_from_none(body: str, released: bool) -> None:
    method = ast.parse(f"def verb(self, plan, stage, answer, other, quick):\n    {body}\n").body[0]
    assert isinstance(method, ast.FunctionDef)
    assert returns_released(method, RELEASES) is released
