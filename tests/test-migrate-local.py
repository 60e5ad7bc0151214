#!/usr/bin/python3
# nbdferry - migrate DISK URI: a migration without a daemon
# SPDX-License-Identifier: BSD-3-Clause
"""The disk moves with its bitmaps, once; locked, it is left alone; cancelled or
killed anywhere, it is here or there, never both, never neither."""

from ferrytest import *
from migratetest import *
from nbdtest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "qemu-storage-daemon")

SIZE = 24 * MiB


def prepare(names=("vda",)):
    """Disks with data and a bitmap each, closed in good order."""
    models = {n: make_disk("%s.raw" % n, SIZE, seed=i)
              for i, n in enumerate(names)}
    kit = Nbdkit(*["disk=%s=%s.raw" % (n, n) for n in names], "control=ctl",
                 name="before")
    qmp = QMP("ctl")
    for n in names:
        qmp.command("block-dirty-bitmap-add", node=n, name="b " + n,
                    granularity=4096, persistent=True)
        h = kit.connect(n)
        h.pwrite(n.encode() * 1024, 3 * MiB + 4096)
        models[n].set(3 * MiB + 4096, n.encode() * 1024)
        h.shutdown()
    kit.stop()
    return models


def destination(names=("vda",), **kwargs):
    args = []
    for n in names:
        args += ["disk=%s=dst-%s.raw" % (n, n), "size=%d" % SIZE]
    return Nbdkit(*args, "incoming=on", name="dst", **kwargs)


def has_arrived(dst, names, models):
    for n in names:
        h = dst.connect(n)
        assert h.pread(len(n), 3 * MiB + 4096) == n.encode()
        h.shutdown()
    dst.stop()
    for n in names:
        compare("dst-%s.raw" % n, models[n])
        got = bitmap_ranges("dst-%s.raw.ferry/bitmaps.qcow2" % n, "b " + n)
        start, end = 3 * MiB + 4096, 3 * MiB + 4096 + len(n) * 1024
        assert got == granules([(start, end)], 4096, SIZE), got


def is_gone(name, *args):
    """Neither a daemon serves it, nor is it moved again."""
    kit = Nbdkit("disk=%s=%s.raw" % (name, name), name="gone")
    try:
        connect(kit.uri(name))
        raise AssertionError("it is served here too")
    except nbd.Error:
        pass
    kit.kill()


def moves():
    models = prepare()
    dst = destination(tcp=True)
    p = run_nbdferry("migrate", "vda.raw", dst.uri("vda"), "--json",
                     "--compression", "zstd", "--channels", "2")
    infos = [json.loads(line) for line in p.stdout.splitlines()]
    assert infos[-1]["status"] == "completed", infos[-1]
    p = run_nbdferry("migrate", "vda.raw", dst.uri("vda"), check=False)
    assert p.returncode == 1 and "was handed over to" in p.stderr, p.stderr
    has_arrived(dst, ["vda"], models)
    clear_folder()
    # Two, with names of their own, and a state directory elsewhere.
    models = prepare(("a", "b"))
    dst = destination(("a", "b"))
    p = run_nbdferry("migrate", "a=a.raw", "b=./b.raw",
                     "nbd+unix://?socket=" + dst.socket)
    assert "completed in" in p.stdout
    has_arrived(dst, ["a", "b"], models)
    clear_folder()
    models = prepare()
    os.rename("vda.raw.ferry", "elsewhere")
    dst = destination()
    run_nbdferry("migrate", "vda=vda.raw", "--state", "elsewhere",
                 dst.uri("vda"))
    assert not os.path.exists("vda.raw.ferry")
    has_arrived(dst, ["vda"], models)
    clear_folder()


def from_server():
    """A disk that an NBD server holds, and nobody serves."""
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    h = connect(qsd.uri("vda"))
    h.pwrite(b"q" * 4096, MiB)
    h.shutdown()
    p = run_nbdferry("migrate", qsd.uri("vda"), "nbd://127.0.0.1:1/vda",
                     check=False)
    assert p.returncode == 1 and "--state" in p.stderr, p.stderr
    dst = destination()
    run_nbdferry("migrate", qsd.uri("vda"), dst.uri("vda"), "--state", "st")
    h = dst.connect("vda")
    assert h.pread(4096, MiB) == b"q" * 4096
    h.shutdown()
    dst.stop()
    qsd.stop()
    clear_folder()


def data_only():
    """To a server of any kind: a copy; the disk and its bitmaps stay."""
    models = prepare()
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    run_nbdferry("migrate", "vda.raw", qsd.uri("vda"), "--data-only",
                 "--bitmaps-to", "b.qcow2")
    qsd.stop()
    subprocess.check_call(["qemu-img", "compare", "-q", "-f", "raw", "-F",
                           "qcow2", "vda.raw", "a.qcow2"])
    compare("vda.raw", models["vda"])
    qemu_img_check("b.qcow2")
    want = bitmap_ranges("b.qcow2", "b vda")
    assert want and want == bitmap_ranges("vda.raw.ferry/bitmaps.qcow2",
                                          "b vda")
    kit = Nbdkit("disk=vda=vda.raw", "control=ctl")
    assert ranges_of(QMP("ctl"), "vda", "b vda")["recording"]
    kit.stop()
    clear_folder()


def refused():
    prepare()

    def fails(text, *args, status=1):
        p = run_nbdferry("migrate", *args, check=False)
        assert p.returncode == status and text in p.stderr, p.stderr

    kit = Nbdkit("disk=vda=vda.raw", "control=ctl")
    fails("in use by another process", "vda.raw", "nbd://127.0.0.1:1")
    kit.stop()
    fails("connect", "vda.raw", "nbd://127.0.0.1:1/vda")
    fails("there is no control socket", "none.raw", "nbd://127.0.0.1:1")
    fails("No such file", "vda=none.raw", "nbd://127.0.0.1:1")
    fails("--node", "vda.raw", "nbd://h", "--node", "x", status=2)
    fails("--no-wait", "vda.raw", "nbd://h", "--no-wait", status=2)
    fails("--state", "vda.raw", "b.raw", "nbd://h", "--state", "s", status=2)
    # Nothing of that did harm.
    kit.start()
    assert ranges_of(QMP("ctl"), "vda", "b vda")["recording"]
    kit.stop()
    clear_folder()


def start_slowly(dst):
    """The command, in the middle of it."""
    p = subprocess.Popen([NBDFERRY, "migrate", "vda.raw", dst.uri("vda"),
                          "--json", "--max-bandwidth", "4M", "--channels",
                          "1"], stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
    for line in p.stdout:
        if json.loads(line)["disk"]["normal"] > 0:
            return p
    raise AssertionError("it ended: " + p.stderr.read())


def cancelled():
    models = prepare()
    dst = destination()
    p = start_slowly(dst)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=TIMEOUT)
    assert p.returncode == 130 and "was cancelled" in err, (p.returncode, err)
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"
    # kill -9 before it lets go: as if nothing had been.
    p = start_slowly(dst)
    p.kill()
    p.communicate()
    kit = Nbdkit("disk=vda=vda.raw", "control=ctl")
    assert ranges_of(QMP("ctl"), "vda", "b vda")["recording"]
    kit.stop()
    run_nbdferry("migrate", "vda.raw", dst.uri("vda"))
    has_arrived(dst, ["vda"], models)
    clear_folder()


class Cut(threading.Thread):
    """A relay that lets no COMMIT through, or no answer to it: it stops, for
    good, once the source's journal says gone."""

    def __init__(self, target, journal, answers_only):
        super().__init__(daemon=True)
        self.target, self.journal = target, journal
        self.answers_only = answers_only
        self.path = os.path.join(TMPDIR, "relay.sock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.stopped = False
        self.start()

    def run(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            for args in (client, server, False), (server, client, True):
                threading.Thread(target=self.copy, args=args,
                                 daemon=True).start()

    def copy(self, a, b, answers):
        try:
            while True:
                data = a.recv(65536)
                if not data:
                    break
                with open(self.journal, "rb") as f:
                    gone = b'"gone"' in f.read()
                if gone and (answers or not self.answers_only):
                    self.stopped = True
                    return
                b.sendall(data)
        except OSError:
            pass
        try:
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def killed_in_between():
    """COMMIT, or its answer, was lost: the journal says gone, and who opens the
    disk next finishes it."""
    for how in "command", "daemon":
        models = prepare()
        dst = destination()
        relay = Cut(dst.socket, "vda.raw.ferry/journal", how == "daemon")
        p = subprocess.Popen([NBDFERRY, "migrate", "vda.raw",
                              "nbd+unix:///vda?socket=" + relay.path],
                             stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
        wait_for(lambda: relay.stopped, "the handover")
        p.kill()
        p.communicate()
        relay.listener.close()
        os.unlink(relay.path)
        os.symlink(dst.socket, relay.path)
        if how == "command":
            p = run_nbdferry("migrate", "vda.raw", "nbd://ignored")
            assert "is completed" in p.stderr, p.stderr
            p = run_nbdferry("migrate", "vda.raw", "nbd://x", check=False)
            assert p.returncode == 1 and "was handed over" in p.stderr
        else:
            kit = Nbdkit("disk=vda=vda.raw", name="after")
            def forwarded():
                try:
                    h = connect(kit.uri("vda"))
                except nbd.Error:
                    return False
                data = h.pread(3, 3 * MiB + 4096)
                h.shutdown()
                return data == b"vda"
            wait_for(forwarded, "the daemon to forward")
            kit.stop()
        has_arrived(dst, ["vda"], models)
        clear_folder()


moves()
from_server()
data_only()
refused()
cancelled()
killed_in_between()
