"""A headless Chromium, spoken to through its DevTools pipe: nothing but the browser is needed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-extensions", "--disable-dev-shm-usage", "--disable-background-networking",
)  # fmt: skip
# The browser reads commands from descriptor 3 and answers on 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60  # seconds
SERIOUS = ("error", "warning", "assert")


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _pipe() -> tuple[int, int]:
    """Both ends at descriptors that 3 and 4 do not overwrite."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high


class Browser:
    """One page of a browser of its own. Use as a context manager."""

    def __init__(self, profile: Path):
        (theirs_in, self.out), (self.inside, theirs_out) = _pipe(), _pipe()
        command = [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.buffer, self.session, self.errors = 0, b"", None, []

    def __enter__(self) -> "Browser":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(timeout=PATIENCE)
        os.close(self.out)
        os.close(self.inside)

    def call(self, method: str, **parameters):
        """The answer to a command; console errors that come meanwhile are kept in `errors`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inside], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            piece = os.read(self.inside, 1 << 20)
            assert piece, "the browser has ended"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        said, name = event.get("params", {}), event.get("method")
        if name == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"])
        elif name == "Runtime.consoleAPICalled" and said["type"] in SERIOUS:
            self.errors.append(said["args"])
        elif name == "Log.entryAdded" and said["entry"]["level"] in SERIOUS:
            self.errors.append(said["entry"])

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show a file whose page says when it is ready."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready !== undefined")

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"never true: {condition}; {self.errors}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """As a mouse does: whatever lies on top at the middle of the element gets it."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{find}.scrollIntoView({{block: 'center'}})")
        box = f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({find}"
        x, y = self.evaluate(f"{box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            place = dict(x=x, y=y, button="left", clickCount=1)
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def press(self, key: str, text: str = "") -> None:
        more = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
