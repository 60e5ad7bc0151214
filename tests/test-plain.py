#!/usr/bin/python3
# nbdferry - disks copied to NBD servers that are not ours
# SPDX-License-Identifier: BSD-3-Clause
"""migrate --data-only: what the server has is the disk at one instant, with
the bitmaps of that instant; whatever the server can do and cannot."""

from ferrytest import *
from migratetest import *
from nbdtest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "qemu-storage-daemon")

SIZE = 24 * MiB
TRAIL = SIZE - MiB  # where Counter leaves its trail


class Counter(threading.Thread):
    """Writes n = 1, 2, … to two places in turn, each one after the one before
    was answered; so at any instant the first is the second or one more.  It
    also leaves a trail, a sector for each fourth n."""

    def __init__(self, first, second):
        super().__init__(daemon=True)
        self.places = [first, second]
        self.handles = [connect(uri) for uri, offset in self.places]
        self.n, self.ending = 0, False
        self.start()

    def run(self):
        while not self.ending:
            self.n += 1
            for h, (uri, offset) in zip(self.handles, self.places):
                h.pwrite(self.n.to_bytes(8, "big") + bytes(504), offset)
            offset = TRAIL + self.n // 4 * 512
            if self.n % 4 == 0 and offset < SIZE - 512:
                self.handles[0].pwrite(b"trail" + bytes(507), offset)
            time.sleep(0.0002)

    def stop(self):
        self.ending = True
        self.join()


def number(data, offset):
    return int.from_bytes(data[offset:offset + 8], "big")


def copied(target, what, uri=None, bitmaps=False):
    """Under load; the source goes on, and the copy is one of an instant."""
    model = make_disk("src.raw", SIZE, step=512 * 1024 + 512)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    qmp = QMP("src.ctl")
    for shift in 9, 16:
        qmp.command("block-dirty-bitmap-add", node="vda", name="g%d" % shift,
                    granularity=1 << shift, persistent=True)
    qmp.command("block-dirty-bitmap-add", node="vda", name="still",
                disabled=True, persistent=True)
    counter = Counter((src.uri("vda"), 0), (src.uri("vda"), SIZE - 512))
    w = LoggingWriter(src.uri("vda"), model, MiB, SIZE - MiB, pause=0.0005)
    settle(w, 20)
    args = ["--bitmaps-to", "b.qcow2"] if bitmaps else []
    p = run_nbdferry("migrate", "src.ctl", uri or target.uri("vda"),
                     "--data-only", "--json", *args)
    last = json.loads(p.stdout.splitlines()[-1])
    assert last["status"] == "completed", last
    # It was a copy: clients go on, and the disk is here.
    settle(w, 20)
    w.stop()
    counter.stop()
    assert w.errors == 0
    assert json.loads(run_nbdferry("status", "src.ctl", "--json").stdout)[
        "disks"][0]["mode"] == "active"
    copy = read_small(uri or target.uri("vda"))
    a, b = number(copy, 0), number(copy, SIZE - 512)
    assert 0 < a and a - b in (0, 1), (a, b)
    assert a <= counter.n
    src.stop()
    # Where nobody has written since before the copy began, it is the source;
    # and what differs from the source now has been written since.
    now = open("src.raw", "rb").read()
    touched = bytearray(SIZE // 512)
    for start, end in w.touched:
        touched[start // 512:-(-end // 512)] = b"\1" * (-(-end // 512)
                                                        - start // 512)
    touched[0] = touched[-1] = 1
    for at in range(TRAIL, SIZE, 512):
        touched[at // 512] = 1
    assert all(touched[s] or copy[s * 512:s * 512 + 512] ==
               now[s * 512:s * 512 + 512] for s in range(SIZE // 512))
    if bitmaps:
        check_bitmaps(copy, w, SIZE)
    print("%s: %d rounds, downtime %d ms, %d and %d of %d" % (
        what, last["disk"]["dirty-sync-count"], last["downtime"], a, b,
        counter.n))


def check_bitmaps(copy, writer, size):
    """The file is an image with the bitmaps of that instant."""
    qemu_img_check("b.qcow2")
    info = {b["name"]: b for b in qemu_img_info("b.qcow2")
            ["format-specific"]["data"]["bitmaps"]}
    assert set(info) == {"g9", "g16", "still"}, info
    assert info["g9"]["granularity"] == 512
    assert "auto" in info["g9"]["flags"] and not info["still"]["flags"]
    assert bitmap_ranges("b.qcow2", "still") == []
    # It is the instant of the copy: where the trail ends in one, it ends in the
    # other.
    got = bitmap_ranges("b.qcow2", "g9")
    trail = [at for at in range(TRAIL, size - 512, 512)
             if copy[at:at + 5] == b"trail"]
    assert 0 < len(trail) < MiB // 512 - 1
    marked = [at for at in range(TRAIL, size - 512, 512)
              if any(start <= at < end for start, end in got)]
    assert marked == trail, (marked[-1], trail[-1])
    got = [r for r in got if r[1] <= TRAIL]
    counted = [(0, 512)]
    # And of the writes before it, none is missing.
    n = len(writer.touched)
    while n and granules(counted + writer.touched[:n], 512, size) != got:
        n -= 1
    assert n > 0
    got = bitmap_ranges("b.qcow2", "g9")
    assert bitmap_ranges("b.qcow2", "g16") == granules(got, 65536, size)
    # QEMU merges them into an image of its own, and we import them.
    make_qcow2("c.qcow2", size)
    subprocess.check_call(["qemu-img", "bitmap", "--add", "-g", "512",
                           "--merge", "g9", "-b", "b.qcow2", "-F", "qcow2",
                           "c.qcow2", "g9"])
    assert bitmap_ranges("c.qcow2", "g9") == got
    with open("t.raw", "wb") as f:
        f.truncate(size)
    kit = Nbdkit("disk=t=t.raw", "control=t.ctl", name="t")
    run_nbdferry("bitmap", "import", "t.ctl", "b.qcow2")
    kit.stop()
    assert bitmap_ranges("t.raw.ferry/bitmaps.qcow2", "g9") == got


def to_qemu():
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    copied(qsd, "qcow2 in qemu-storage-daemon", bitmaps=True)
    # Again, over what is there; nothing of the old is left.
    size = os.path.getsize("a.qcow2")
    for f in os.listdir("."):
        if f.startswith(("src", "b.qcow2")) and os.path.exists(f):
            subprocess.run(["rm", "-rf", f], check=True)
    copied(qsd, "the same again")
    qsd.stop()
    qemu_img_check("a.qcow2")
    assert os.path.getsize("a.qcow2") <= size + 4 * MiB
    clear_folder()
    # An idle disk: byte for byte, by qemu-img's judgement.
    make_disk("src.raw", SIZE)
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    run_nbdferry("migrate", "src.ctl", qsd.uri("vda"), "--data-only")
    src.stop()
    qsd.stop()
    subprocess.check_call(["qemu-img", "compare", "-q", "-f", "raw", "-F",
                           "qcow2", "src.raw", "a.qcow2"])
    clear_folder()


def to_others():
    for what, options, args in (
            ("all", (), ()),
            ("little", ("--filter=nozero", "--filter=multi-conn",
                        "--filter=noextents", "--filter=fua"),
             ("multi-conn-mode=disable",)),
            ("no zeros", ("--filter=nozero",), ()),
            ("blocks", ("--filter=blocksize-policy",),
             ("blocksize-minimum=4096", "blocksize-preferred=4096",
              "blocksize-maximum=65536", "blocksize-error-policy=error"))):
        kit = Nbdkit("%d" % SIZE, *args, plugin="memory", name="target",
                     options=options)
        h = connect(kit.uri())  # something old is there
        for offset in range(0, SIZE, 4 * MiB):
            h.pwrite(b"old!" * 1024, offset + 3 * MiB)
        h.shutdown()
        copied(kit, what)
        kit.stop()
        clear_folder()


def paced():
    """max-bandwidth holds; and a limit that is lifted lets go at once."""
    make_disk("src.raw", 8 * MiB, step=8 * MiB)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    target = Nbdkit("%d" % (8 * MiB), plugin="memory", name="target")
    qmp = QMP("src.ctl")
    qmp.command("migrate-set-parameters", max_bandwidth=4 * MiB)
    run_nbdferry("migrate", "src.ctl", target.uri(), "--data-only")
    info = qmp.command("query-migrate")
    # Two seconds, but for what it is given in advance.
    assert info["total-time"] >= 1500, info
    qmp.command("migrate-set-parameters", max_bandwidth=1)
    qmp.command("migrate", uri=target.uri(), x_ferry_data_only=True)
    wait_for(lambda: qmp.command("query-migrate")["status"] == "active",
             "the copy")
    qmp.command("migrate-set-parameters", max_bandwidth=0)
    wait_for(lambda: qmp.command("query-migrate")["status"] == "completed",
             "its end")
    assert read_all(target.uri()) == open("src.raw", "rb").read()
    target.stop()
    src.stop()
    clear_folder()


def several():
    """Two disks at one instant, each under its own name."""
    for i in "ab":
        make_disk("%s.raw" % i, SIZE)
        make_qcow2("%s.qcow2" % i, SIZE)
    qsd = Storage({"a": "a.qcow2", "b": "b.qcow2"})
    src = Nbdkit("disk=a=a.raw", "disk=b=b.raw", "control=src.ctl",
                 name="src")
    counter = Counter((src.uri("a"), 0), (src.uri("b"), 0))
    uri = "nbd+unix://?socket=" + qsd.socket
    p = run_nbdferry("migrate", "src.ctl", uri, "--data-only",
                     "--bitmaps-to", "x.qcow2", check=False)
    assert p.returncode == 1 and "one disk" in p.stderr, p.stderr
    for _ in range(3):
        run_nbdferry("migrate", "src.ctl", uri, "--data-only")
        a = number(read_all(qsd.uri("a")), 0)
        b = number(read_all(qsd.uri("b")), 0)
        assert a > 0 and a - b in (0, 1), (a, b)
    counter.stop()
    src.stop()
    qsd.stop()
    clear_folder()


def by_itself():
    """A server of another kind gets a copy, and who asked is told; from a
    daemon, and from a file that nobody has open."""
    model = make_disk("src.raw", SIZE)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    ours = Nbdkit("disk=vda=other.raw", "size=%d" % SIZE, name="ours")
    memory = Nbdkit("%d" % SIZE, plugin="memory", name="target")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2",
                    str(SIZE)], check=True)
    qsd = Storage({"vda": "q.qcow2"})

    def told(source, uri):
        p = run_nbdferry("migrate", source, uri, "--json")
        assert "stay here" in p.stderr and p.stderr.count("\n") == 1, p
        states = [json.loads(line)["status"] for line in p.stdout.splitlines()]
        assert states[-1] == "completed" and "failed" not in states, p
        assert read_all(uri) == model.data

    def turned_away(source):
        for uri in ours.uri(), ours.uri("vda"):
            p = run_nbdferry("migrate", source, uri, check=False)
            assert p.returncode == 1 and "is active" in p.stderr, p
            assert read_all(uri) == bytes(SIZE)

    for uri in qsd.uri("vda"), memory.uri():
        told("src.ctl", uri)
    turned_away("src.ctl")
    qmp = QMP("src.ctl")
    qmp.command("migrate", uri=memory.uri())
    info = wait_for(lambda: (lambda i: i["status"] == "failed" and i)(
        qmp.command("query-migrate")), "its end")
    assert info["x-ferry"]["other-server"] is True, info
    qmp.close()
    src.stop()
    told("vda=src.raw", memory.uri())
    turned_away("vda=src.raw")
    for server in ours, memory, qsd:
        server.stop()
    clear_folder()


def refused():
    make_disk("src.raw", SIZE)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    target = Nbdkit("%d" % (SIZE - 512), plugin="memory", name="target")

    def fails(text, *args):
        p = run_nbdferry("migrate", "src.ctl", *args, check=False)
        assert p.returncode in (1, 2) and text in p.stderr, p.stderr

    # What cannot go there is not left out.
    for more in "--attach=x=src.raw", "--bitmap=b", "--hints=fs":
        fails("--data-only" if more != "--bitmap=b" else "'b'", target.uri(),
              more)
    fails("has %d bytes" % (SIZE - 512), target.uri(), "--data-only")
    fails("needs --data-only", target.uri(), "--bitmaps-to", "x.qcow2")
    target.stop()
    fails("connect", target.uri(), "--data-only")
    target = Nbdkit("%d" % SIZE, plugin="memory", name="target",
                    options=("-r",))
    fails("for reading only", target.uri(), "--data-only")
    target.stop()
    open("x.qcow2", "w").close()
    target = Nbdkit("%d" % (SIZE + MiB), plugin="memory", name="target")
    fails("File exists", target.uri(), "--data-only", "--bitmaps-to",
          "x.qcow2")
    # A larger one is fine, and what lies beyond stays.
    h = connect(target.uri())
    h.pwrite(b"tail" * 128, SIZE)
    run_nbdferry("migrate", "src.ctl", target.uri(), "--data-only")
    assert h.pread(4, SIZE) == b"tail"
    h.shutdown()
    data = read_all(target.uri())
    assert data[:SIZE] == open("src.raw", "rb").read()
    target.stop()
    src.stop()
    clear_folder()


def broken():
    """The target dies, hangs, or refuses; or it is cancelled: the source is
    as it was, and the next one works."""
    model = make_disk("src.raw", SIZE)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    qmp = QMP("src.ctl")
    slow = Nbdkit("%d" % SIZE, "delay-write=50ms", plugin="memory",
                  name="slow", options=("--filter=delay",))
    writer = LoggingWriter(src.uri("vda"), model, pause=0.001)

    def begin(uri):
        qmp.command("migrate", uri=uri, x_ferry_data_only=True)
        wait_for(lambda: qmp.command("query-migrate")["disk"]["normal"] > 0,
                 "the first data")

    def ended():
        def look():
            info = qmp.command("query-migrate")
            return info["status"] in ("failed", "cancelled") and info
        return wait_for(look, "the end")

    begin(slow.uri())
    try:
        qmp.command("migrate", uri=slow.uri(), x_ferry_data_only=True)
        raise AssertionError("two at a time")
    except QMPError as e:
        assert "in progress" in str(e)
    qmp.command("migrate-cancel")
    assert ended()["status"] == "cancelled"
    begin(slow.uri())
    slow.kill()
    info = ended()
    assert info["status"] == "failed" and "write" in info["error-desc"], info
    # One that does not answer any more is given up by a cancel.
    slow.start()
    begin(slow.uri())
    slow.process.send_signal(signal.SIGSTOP)
    qmp.command("migrate-cancel")
    assert ended()["status"] == "cancelled"
    slow.process.send_signal(signal.SIGCONT)
    full = Nbdkit("%d" % SIZE, "error-pwrite=ENOSPC", "error-pwrite-rate=100%",
                  plugin="memory", name="full", options=("--filter=error",))
    qmp.command("migrate", uri=full.uri(), x_ferry_data_only=True)
    info = ended()
    assert "No space left" in info["error-desc"], info
    full.stop()
    # The daemon ends in the middle of one.
    begin(slow.uri())
    writer.stop()
    assert writer.errors == 0
    assert read_all(src.uri("vda")) == bytes(model.data)
    src.stop()
    src.start()
    run_nbdferry("migrate", "src.ctl", slow.uri(), "--data-only",
                 "--channels", "16")
    assert read_all(slow.uri()) == bytes(model.data)
    src.stop()
    slow.stop()
    clear_folder()


def slow_pieces():
    """Each write takes a tenth of a second over there, so what is left in small
    pieces takes far longer than its bytes would.  Writers do not wait for it."""
    model = Model(2 * SIZE, os.urandom(2 * SIZE))
    with open("src.raw", "wb") as f:
        f.write(model.data)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    slow = Nbdkit("%d" % (2 * SIZE), "delay-write=100ms", plugin="memory",
                  name="slow", options=("--filter=delay",))
    qmp = QMP("src.ctl")
    writer = Writer(src.uri("vda"), model, seed=5, max_length=4096,
                    pause=0.0005)
    writer.kinds = ["write"]
    qmp.command("migrate-set-parameters", downtime_limit=300)
    qmp.command("migrate", uri=slow.uri(), x_ferry_data_only=True)
    end = time.monotonic() + 8
    wait_for(lambda: time.monotonic() > end or qmp.command(
        "query-migrate")["status"] not in ("setup", "active", "device"),
             "some seconds")
    qmp.command("migrate-cancel")
    wait_for(lambda: qmp.command("query-migrate")["status"] in
             ("cancelled", "completed"), "the end")
    writer.stop()
    assert writer.errors == 0, writer.last_error
    assert writer.longest < 5, writer.longest
    print("slow pieces: %.1f s at most" % writer.longest)
    src.stop()
    slow.stop()
    clear_folder()


to_qemu()
to_others()
slow_pieces()
paced()
several()
by_itself()
refused()
broken()
