# nbdferry - other NBD servers, for tests
# SPDX-License-Identifier: BSD-3-Clause

from ferrytest import *
from migratetest import *

MiB = 1 << 20


class Storage:
    """A qemu-storage-daemon that serves images {export: qcow2 path} on
    NAME.sock; with bitmaps {export: [name]}."""

    def __init__(self, images, name="qsd", bitmaps=None, writable=True):
        self.name, self.socket = name, os.path.join(TMPDIR, name + ".sock")
        self.images, self.bitmaps = images, bitmaps or {}
        self.writable, self.process = writable, None
        atexit.register(self.kill)
        self.start()

    def start(self):
        pidfile = self.name + ".qpid"
        for old in pidfile, self.socket:
            if os.path.exists(old):
                os.unlink(old)
        argv = ["qemu-storage-daemon", "--pidfile", pidfile]
        exports = []
        for i, (export, path) in enumerate(self.images.items()):
            argv += ["--blockdev", "driver=file,filename=%s,node-name=f%d"
                     % (path, i),
                     "--blockdev", "driver=qcow2,file=f%d,node-name=q%d,"
                     "discard=unmap" % (i, i)]
            names = self.bitmaps.get(export, [])
            exports += ["--export", json.dumps(
                {"type": "nbd", "id": "e%d" % i, "node-name": "q%d" % i,
                 "name": export, "writable": self.writable,
                 "bitmaps": names})]
        argv += ["--nbd-server", "addr.type=unix,addr.path=%s,"
                 "max-connections=0" % self.socket] + exports
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        wait_for(lambda: os.path.exists(pidfile) or self.process.poll(),
                 "qemu-storage-daemon")
        assert self.process.poll() is None

    def uri(self, export=""):
        return "nbd+unix:///%s?socket=%s" % (
            urllib.parse.quote(export, safe=""), self.socket)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(TIMEOUT) == 0
        self.process = None

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def read_small(uri):
    """All of an export, in requests that every server takes."""
    h, step = connect(uri), 65536
    size = h.get_size()
    return b"".join(h.pread(min(step, size - offset), offset)
                    for offset in range(0, size, step))


def make_qcow2(path, size):
    subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2", path,
                           str(size)])


def ranges_of(qmp, node, name):
    """(count, state) of a bitmap, as the daemon says."""
    for n in qmp.command("query-named-block-nodes"):
        if n["node-name"] == node:
            for b in n["dirty-bitmaps"]:
                if b["name"] == name:
                    return b
    return None


__all__ = [n for n in dir() if not n.startswith("_")]
