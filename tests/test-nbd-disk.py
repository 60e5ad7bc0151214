#!/usr/bin/python3
# nbdferry - a disk that another NBD server holds
# SPDX-License-Identifier: BSD-3-Clause
"""Served and tracked byte for byte and bit for bit, whatever the server can
do and cannot; refused where it must be; and what a lost server means."""

from ferrytest import *
from migratetest import *
from nbdtest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "qemu-storage-daemon")

SIZE = 24 * MiB


def clean_state():
    subprocess.run(["rm", "-rf", "st"], check=True)


def refused(*args):
    try:
        Nbdkit(*args, name="refused")
    except RuntimeError as e:
        return str(e)
    raise AssertionError("was not refused: %s" % (args,))


def names():
    """The name is what stands before the first =, if it holds no /."""
    server = Nbdkit("64M", plugin="memory", name="server")
    uri = "nbd+unix:///some/vdx?socket=server.sock"  # relative
    kit = Nbdkit(uri, "state=s1", "disk=b=" + uri, "state=s2",
                 "disk=nbd+unix:///?socket=server.sock", "state=s3",
                 "control=ctl")
    nodes = QMP("ctl").command("query-named-block-nodes")
    nodes = {n["node-name"]: n for n in nodes}
    assert sorted(nodes) == ["b", "nbd", "vdx"], nodes
    assert nodes["vdx"]["file"].endswith("?socket=%s/server.sock" % TMPDIR)
    kit.stop()
    say = refused(uri)
    assert "state=DIR" in say, say
    say = refused(uri, "state=s1", "size=64M")
    assert "size=" in say, say
    say = refused("f.raw", "size=1M", "nbd-timeout=3")
    assert "nbd-timeout=" in say, say
    server.stop()
    say = refused(uri, "state=s1")
    assert "server.sock" in say and "connect" in say, say
    server = Nbdkit("1000", plugin="memory", name="server")
    say = refused(uri, "state=s1")
    assert "1000 bytes" in say and "multiple of 512" in say, say
    server.stop()
    clear_folder()


def tracked(server, what, size=SIZE):
    """Writers, a model, and a bitmap; then again after kill -9."""
    kit = Nbdkit("disk=vda=" + server.uri("vda"), "state=st", "control=ctl")
    qmp = QMP("ctl")
    for shift in 9, 16:
        qmp.command("block-dirty-bitmap-add", node="vda", name="g%d" % shift,
                    granularity=1 << shift, persistent=True)
    model = Model(size)
    half = size // 2 + 512
    writers = [LoggingWriter(kit.uri("vda"), model, 0, half, seed=1),
               LoggingWriter(kit.uri("vda"), model, half, size, seed=2)]
    for w in writers:
        settle(w, 60)
        w.stop()
        assert w.errors == 0, w.last_error
    h = kit.connect("vda")
    # No sector, and no block of the server's, begins or ends here.
    for offset, data in (5001, b"abc" * 99), (size - 513, b"x" * 513), \
            (3 * 4096 - 1, b"yz"):
        h.pwrite(data, offset)
        model.set(offset, data)
        writers[0].touched.append((offset, offset + len(data)))
    h.zero(10001, 70001)
    model.set(70001, bytes(10001))
    writers[0].touched.append((70001, 80002))
    assert h.pread(100, 4990) == model.data[4990:5090]
    ranges = status_ranges(h, "base:allocation", lambda f: not f & 2)
    covered = bytearray(size)
    for start, end in ranges:
        covered[start:end] = b"\1" * (end - start)
    for at in range(0, size, 512):
        if not covered[at]:
            assert not any(model.data[at:at + 512]), at
    h.flush()
    h.shutdown()
    assert read_all(kit.uri("vda")) == bytes(model.data)
    kit.kill()
    kit.start()
    # The server has it.
    assert read_small(server.uri("vda")) == bytes(model.data)
    listed = json.loads(run_nbdferry("bitmap", "list", "ctl",
                                     "--json").stdout)
    assert all(b["trust"] == "unverifiable" for b in listed), listed
    kit.stop()
    qemu_img_check("st/bitmaps.qcow2")
    touched = [t for w in writers for t in w.touched]
    for shift in 9, 16:
        got = bitmap_ranges("st/bitmaps.qcow2", "g%d" % shift)
        assert got == granules(touched, 1 << shift, size), (what, shift)
    print("%s: %d requests" % (what, sum(w.done for w in writers)))


def servers():
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    tracked(qsd, "qcow2 in qemu-storage-daemon")
    # QEMU itself, with the sidecar's bitmaps and the disk where it really is.
    p = subprocess.run(
        ["qemu-io", "-r", "--image-opts", "driver=qcow2,"
         "file.filename=st/bitmaps.qcow2,data-file.driver=nbd,"
         "data-file.server.type=unix,data-file.server.path=%s,"
         "data-file.export=vda" % qsd.socket, "-c", "read -v 5001 9"],
        stdout=subprocess.PIPE, text=True, check=True)
    assert "abcabcabc" in p.stdout, p.stdout
    # What bitmaps.qcow2 names is plainly not the disk.
    with open("st/not-the-disk.raw", "rb") as f:
        assert b"not the disk" in f.read(512)
    assert os.path.getsize("st/not-the-disk.raw") == SIZE
    qsd.stop()
    qemu_img_check("a.qcow2")
    clear_folder()
    for what, options, args in (
            ("all", (), ()),
            ("little", ("--filter=nozero", "--filter=multi-conn",
                        "--filter=noextents", "--filter=fua"),
             ("multi-conn-mode=disable",)),
            ("emulated", ("--filter=nozero", "--filter=fua"),
             ("zeromode=emulate", "fuamode=emulate")),
            ("blocks", ("--filter=blocksize-policy",),
             ("blocksize-minimum=4096", "blocksize-preferred=4096",
              "blocksize-maximum=65536", "blocksize-error-policy=error"))):
        kit = Nbdkit("%d" % SIZE, *args, plugin="memory", name="server",
                     options=options)
        tracked(kit, what)
        kit.stop()
        clear_folder()


def neighbours():
    """Clients that write sectors of one and the same block of the server."""
    server = Nbdkit("1M", "blocksize-minimum=4096", "blocksize-preferred=4096",
                    "blocksize-maximum=64K", "blocksize-error-policy=error",
                    "delay-read=1ms", "delay-write=1ms",
                    plugin="memory", name="server",
                    options=("--filter=blocksize-policy", "--filter=delay"))
    kit = Nbdkit("disk=vda=" + server.uri("vda"), "state=st")

    def write(i):
        h = kit.connect("vda")
        for n in range(1, 16):
            # Sectors one by one, and the eighth takes the next block whole.
            for block in range(2):
                if i == 7:
                    h.pwrite(bytes([n]) * 4096, (2 + block) * 4096)
                h.pwrite(bytes([i * 16 + n]) * 512, block * 4096 + i * 512)
                h.zero(256, block * 4096 + i * 512 + 256)
        h.shutdown()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    h = kit.connect("vda")
    for block in range(2):
        for i in range(8):
            assert h.pread(512, block * 4096 + i * 512) == \
                bytes([i * 16 + 15]) * 256 + bytes(256), (block, i)
    assert h.pread(8192, 8192) == b"\x0f" * 8192
    h.shutdown()
    kit.stop()
    server.stop()
    clear_folder()


def read_only():
    make_disk("a.raw", SIZE)
    server = Nbdkit("a.raw", plugin="file", name="server", options=("-r",))
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st")
    h = kit.connect("vda")
    assert h.is_read_only() and h.pread(512, 0)
    h.shutdown()
    assert not os.path.exists("st")
    kit.stop()
    server.stop()
    clear_folder()


def resized():
    """What was added at the server is dirty; what is recorded stays."""
    with open("a.raw", "wb") as f:
        f.truncate(SIZE)
    server = Nbdkit("a.raw", plugin="file", name="server")
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "control=ctl")
    QMP("ctl").command("block-dirty-bitmap-add", node="vda", name="b",
                       persistent=True)
    h = kit.connect("vda")
    h.pwrite(b"x" * 512, 0)
    h.shutdown()
    kit.stop()
    server.stop()
    os.truncate("a.raw", SIZE + MiB)
    server.start()
    kit.start()
    kit.stop()
    server.stop()
    qemu_img_check("st/bitmaps.qcow2")
    got = bitmap_ranges("st/bitmaps.qcow2", "b")
    assert got == [(0, 65536), (SIZE, SIZE + MiB)], got
    clear_folder()


def lost():
    """kill -9 of the server, under load and with nothing under way."""
    with open("a.raw", "wb") as f:
        f.truncate(SIZE)
    server = Nbdkit("a.raw", plugin="file", name="server")
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "nbd-timeout=60",
                 "control=ctl")
    QMP("ctl").command("block-dirty-bitmap-add", node="vda", name="b",
                       persistent=True, granularity=512)
    model = Model(SIZE)
    writer = LoggingWriter(kit.uri("vda"), model)
    settle(writer, 50)
    h = kit.connect("vda")
    for _ in range(3):
        server.kill()
        # A read waits for the server, and is answered.
        cookie = h.aio_pread(nbd.Buffer(512), 0)
        before = len(writer.touched)
        server.start()
        while not h.aio_command_completed(cookie):
            h.poll(1000)
        settle(writer, 20)
        assert len(writer.touched) > before
    writer.stop()
    # No write was acknowledged that is not there; those that failed may be.
    compare(read_all(kit.uri("vda")), model)
    print("lost: %d writes, %d failed" % (writer.done, writer.errors))

    h.pwrite(b"a" * 512, 0)
    failed(h.flush)
    h.flush()
    # Nothing is under way, and all is flushed: nobody notices.
    server.kill()
    server.start()
    h.pwrite(b"b" * 512, 0)
    # That one was not flushed: the flush cannot promise it.
    server.kill()
    server.start()
    assert failed(h.flush)
    h.flush()
    assert h.pread(512, 0) == b"b" * 512
    writer.touched.append((0, 512))
    h.shutdown()
    kit.stop()
    got = bitmap_ranges("st/bitmaps.qcow2", "b")
    # All that was written, and at most a little more: what was not flushed
    # when the server was lost is known by 4 KiB.
    may = granules(writer.touched, 4096, SIZE)
    assert granules(got + writer.touched, 512, SIZE) == got
    assert granules(got + may, 4096, SIZE) == may
    server.stop()
    clear_folder()


def forgotten():
    """A server that loses what it had not flushed: a bitmap that was cleared
    since has it again, whatever notices the loss."""
    server = Nbdkit("4M", plugin="memory", name="server")
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "control=ctl")
    qmp, h = QMP("ctl"), kit.connect("vda")

    def command(name, bitmap, **more):
        qmp.command("block-dirty-bitmap-" + name, node="vda", name=bitmap,
                    **more)

    def count(bitmap):
        return ranges_of(qmp, "vda", bitmap)["count"]

    def lose():
        server.kill()
        server.start()
    command("add", "b", persistent=True)
    h.pwrite(b"a" * 512, 0)
    h.flush()
    h.pwrite(b"b" * 512, MiB)
    h.zero(65536, 2 * MiB)
    command("clear", "b")
    lose()
    h.pread(512, 0)
    assert count("b") == 2 * 65536, count("b")
    assert failed(h.flush)
    # Once it was flushed it is sure.
    h.pwrite(b"c" * 512, MiB)
    h.flush()
    command("clear", "b")
    lose()
    h.pread(512, 0)
    assert count("b") == 0
    # One that stops to record, before any request has gone on.
    h.pwrite(b"d" * 512, 3 * MiB)
    command("clear", "b")
    server.kill()
    cookie = h.aio_pread(nbd.Buffer(512), 0)
    wait_for(lambda: kit.log_text().count("connection is lost") == 3,
             "the loss")
    command("disable", "b")
    assert count("b") == 65536
    command("enable", "b")
    server.start()
    while not h.aio_command_completed(cookie):
        h.poll(1000)
    assert failed(h.flush)
    h.flush()
    # Nobody asks any more: the end of the daemon finds it out.
    h.pwrite(b"e" * 512, 0)
    command("clear", "b")
    lose()
    qmp.close()
    h.shutdown()
    kit.stop()
    assert bitmap_ranges("st/bitmaps.qcow2", "b") == [(0, 65536)]
    server.stop()
    clear_folder()


def failed(function, *args):
    try:
        function(*args)
    except nbd.Error:
        return True
    return False


def not_sent_again():
    """A write that was under way fails, and is not tried behind our back."""
    server = Nbdkit("1M", "delay-write=60", "logfile=log", plugin="memory",
                    name="server", options=("--filter=log", "--filter=delay"))
    kit = Nbdkit("disk=vda=" + server.uri("vda"), "state=st")
    h = kit.connect("vda")
    cookie = h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 0)

    def under_way():
        h.poll(0)
        with open("log") as f:
            return "Write" in f.read()

    wait_for(under_way, "the write")
    server.kill()
    os.unlink("log")
    server.start()
    end = time.monotonic() + TIMEOUT
    try:
        while not h.aio_command_completed(cookie):
            assert time.monotonic() < end, "it has been sent again"
            h.poll(100)
        raise AssertionError("it was acknowledged")
    except nbd.Error as e:
        assert "EIO" in str(e), e
    assert h.pread(512, 0) == bytes(512)
    assert not under_way()
    h.shutdown()
    kit.stop()
    server.kill()
    clear_folder()


def gone():
    """The server does not come back: requests fail after the time given, and
    the daemon ends in bounded time."""
    server = Nbdkit("1M", plugin="memory", name="server")
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "nbd-timeout=1",
                 "control=ctl")
    QMP("ctl").command("block-dirty-bitmap-add", node="vda", name="b",
                       persistent=True)
    h = kit.connect("vda")
    h.pwrite(b"x" * 512, 0)
    server.kill()
    assert failed(h.pread, 512, 0)
    assert failed(h.pwrite, b"x" * 512, 65536)
    server.start()
    wait_for(lambda: not failed(h.pread, 512, 0), "the server to be back")
    server.kill()
    kit.terminate()
    kit.wait()
    # It was not closed in good order, for it could not be flushed.
    server.start()
    kit.start()
    b = ranges_of(QMP("ctl"), "vda", "b")
    assert b["recording"] and b["count"] == 2 * 65536, b
    kit.stop()
    # A request that waits does not keep the daemon from ending.
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "nbd-timeout=3600")
    h = kit.connect("vda")
    server.kill()
    h.aio_pread(nbd.Buffer(512), 0)
    h.poll(0)
    kit.terminate()
    kit.wait()
    # Nor does one that waits for a server that is there, and says nothing.
    server.start()
    kit.start()
    h = kit.connect("vda")
    server.process.send_signal(signal.SIGSTOP)
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 0)
    h.poll(0)
    kit.terminate()
    kit.wait()
    server.process.send_signal(signal.SIGCONT)
    clean_state()
    # Nor a command that waits for such a request, or a copy that reads.
    for copy in False, True:
        kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "control=ctl")
        qmp = QMP("ctl")
        qmp.command("block-dirty-bitmap-add", node="vda", name="b")
        h = kit.connect("vda")
        if copy:
            target = Nbdkit(str(SIZE), plugin="memory", name="target")
            qmp.command("migrate-set-parameters", max_bandwidth=65536)
            h.pwrite(os.urandom(MiB), 0)
            qmp.command("migrate", uri=target.uri(), x_ferry_data_only=True)
            wait_for(lambda: qmp.command("query-migrate")["disk"][
                "transferred"] > 0, "the copy")
        server.process.send_signal(signal.SIGSTOP)
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 0)
        h.poll(0)
        if not copy:
            qmp.send({"execute": "block-dirty-bitmap-clear",
                      "arguments": {"node": "vda", "name": "b"}})
        kit.terminate()
        kit.wait()
        server.process.send_signal(signal.SIGCONT)
        clean_state()
    clear_folder()


def destination():
    """A disk of another server's takes a migration."""
    model = make_disk("src.raw", SIZE)
    make_qcow2("a.qcow2", SIZE)
    qsd = Storage({"vda": "a.qcow2"})
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    dst = Nbdkit("disk=vda=" + qsd.uri("vda"), "state=st", "incoming=on",
                 name="dst")
    QMP("src.ctl").command("block-dirty-bitmap-add", node="vda", name="b",
                           persistent=True)
    h = src.connect("vda")
    h.pwrite(b"q" * 4096, MiB)
    model.set(MiB, b"q" * 4096)
    run_nbdferry("migrate", "src.ctl", dst.uri("vda"))
    assert h.pread(4096, MiB) == b"q" * 4096
    h.shutdown()
    src.stop()
    dst.stop()
    assert read_all(qsd.uri("vda")) == bytes(model.data)
    assert bitmap_ranges("st/bitmaps.qcow2", "b") == [(MiB, MiB + 65536)]
    qsd.stop()
    clear_folder()


names()
servers()
neighbours()
read_only()
resized()
lost()
forgotten()
not_sent_again()
gone()
destination()
