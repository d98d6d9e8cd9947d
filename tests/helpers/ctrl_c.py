"""Commands that are interrupted as a user does it."""

import signal
import subprocess
import threading

PATIENCE_S = 240


def heed_ctrl_c() -> None:
    """For a process to start: what a shell starts in the background ignores it, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(process: subprocess.Popen, once: str) -> str:
    """Presses Ctrl-C once a line of the process begins so, or at its end, or when patience ends; returns its stderr."""
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    for line in process.stdout:
        if line.startswith(once):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    watchdog.cancel()
    return stderr
