"""Commands that are interrupted as a user does it."""

import signal
import subprocess
import threading

PATIENCE_S = 240


def heed_ctrl_c() -> None:
    """For a new process: heeds Ctrl-C even if the tests themselves, started in a shell's background, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(process: subprocess.Popen, once: str) -> str:
    """Sends Ctrl-C once the process prints a line with this beginning, ends, or takes too long; returns its stderr."""
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    for line in process.stdout:
        if line.startswith(once):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    watchdog.cancel()
    return stderr
