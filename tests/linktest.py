# nbdferry - a link with a delay, a rate and a window
# SPDX-License-Identifier: BSD-3-Clause
"""tests/linkproxy.c as an object; used by tests and benchmarks."""

import atexit
import os
import subprocess


class Link:
    """A relay to a TCP port of this host; .port is where it listens.

    delay: ms, one way; rate: bytes a second; window: bytes of a connection
    that may be unacknowledged; jitter: ms.
    """

    def __init__(self, port, **options):
        argv = [os.path.join(os.environ.get("builddir", os.getcwd()),
                             "tests/linkproxy")]
        for name, value in options.items():
            argv += ["--" + name, str(value)]
        self.process = subprocess.Popen(
            argv + [str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True)
        atexit.register(self.stop)
        self.port = int(self.process.stdout.readline())

    def command(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def bytes(self):
        """Towards the port, and from it."""
        return [int(n) for n in self.command("bytes").split()]

    def uri(self, export=""):
        return "nbd://127.0.0.1:%d/%s" % (self.port, export)

    def stop(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(10)
