#!/usr/bin/python3
# nbdferry - chains of backups, in all forms, while clients write
# SPDX-License-Identifier: BSD-3-Clause
"""At each point the writer is held, so that it is known what the disk was; a
backup of each form begins; then it writes on while they copy.  Each must hold
the disk as it was, byte for byte, at every point of the chain."""

from ferrytest import *
from chaintest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 24 * MiB + 7 * 512       # more than fits into a pipe and a backup's ring
POINTS = 6


def qcow2_server():
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "out.qcow2",
                    str(SIZE)], check=True)
    p = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-t", "-e", "8", "-k",
                          os.path.abspath("qcow2.sock"), "out.qcow2"])
    wait_for(lambda: is_served("qcow2.sock"), "qemu-nbd")
    return p, "nbd+unix:///?socket=" + os.path.abspath("qcow2.sock")


def chain_of_all_forms():
    disk = Disk(SIZE)
    server, uri = qcow2_server()
    archives, models = [], []
    try:
        for i in range(POINTS):
            models.append(disk.snapshot())
            archives.append("a%d.nbf" % i)
            running = [
                Backup(disk, archives[-1], "--bitmap", "a"),
                Backup(disk, "out.raw", "--format", "raw", "--bitmap", "r",
                       "--granularity=4K" if i == 0 else "--incremental",
                       piped=False),
                Backup(disk, uri, "--bitmap", "n", "--granularity=1M"
                       if i == 0 else "--incremental", piped=False),
            ]
            if i == 0:          # it is held back by the pipe
                assert disk.bitmap("a")["busy"], disk.bitmap("a")
                assert len(disk.backups()) >= 1
            disk.write()
            for b in running:
                b.release()
            assert not disk.bitmap("a")["busy"]
            compare("out.raw", models[-1])
            compare(read_all(uri), models[-1])
        assert disk.backups() == []
        run_nbdferry("archive", "verify", "--chain", *archives)
        for i in range(POINTS):
            restore(archives[:i + 1], models[i])
        merges(archives, models)
    finally:
        server.terminate()
        server.wait()
    disk.stop()


def merges(archives, models):
    """Any part of the chain as one archive."""
    run_nbdferry("archive", "merge", *archives, "all.nbf")
    restore(["all.nbf"], models[-1])
    run_nbdferry("archive", "merge", *archives[1:4], "part.nbf",
                 "--compression=none")
    restore([archives[0], "part.nbf", *archives[4:]], models[-1])
    merged = info("part.nbf")
    assert merged["parent"] == info(archives[0])["point"], merged
    assert merged["point"] == info(archives[3])["point"], merged
    # By a pipe, and of a part and a whole.
    with open("piped.nbf", "wb") as f:
        subprocess.run([NBDFERRY, "archive", "merge", archives[0], "part.nbf",
                        "-"], stdout=f, check=True)
    restore(["piped.nbf"], models[3])


def granularities():
    """Of a bitmap: each of them, and both kinds of compression."""
    disk = Disk(3 * MiB + 512, name="g")
    sizes = [512 << i for i in range(0, 23, 2)]
    for i, g in enumerate(sizes):
        how = ("none", "zlib:9", "zstd:3")[i % 3]
        chain = ["%d.0" % g]
        first = backup(disk, chain[0], "--bitmap=b%d" % g, "--compression",
                       how, "--granularity", g)
        assert first["backups"][0]["granularity"] == g, first
        disk.write(5)
        chain.append("%d.1" % g)
        second = backup(disk, chain[1], "--bitmap=b%d" % g, "--compression",
                        how, "--connections=1")
        assert second["backups"][0]["full"] is False, second
        restore(chain, disk.model)
    disk.stop()


def a_trim_is_not_data():
    """What fstrim drops does not blow an incremental up."""
    disk = Disk(16 * MiB, name="t")
    backup(disk, "t0.nbf", "--bitmap=t")
    h = disk.daemon.connect("vda")
    h.zero(8 * MiB, 0)
    h.trim(4 * MiB, 8 * MiB)
    h.pwrite(bytes(MiB), 15 * MiB)      # zeros that a client has written
    h.shutdown()
    result = backup(disk, "t1.nbf", "--bitmap=t", "--compression=none")
    one = result["backups"][0]
    assert one["data"] == 0, one
    assert one["zeros"] == 13 * MiB, one
    assert os.path.getsize("t1.nbf") < 4096, os.path.getsize("t1.nbf")
    disk.model.data[:12 * MiB] = bytes(12 * MiB)
    disk.model.data[15 * MiB:] = bytes(MiB)
    restore(["t0.nbf", "t1.nbf"], disk.model)
    disk.stop()


def two_disks_at_one_instant():
    """A write to one, acknowledged before one to the other, cannot be missing
    while the other is there."""
    size = 4 * MiB
    for name in "ab":
        make_disk("m%s.raw" % name, size)
    daemon = Nbdkit("disk=a=ma.raw", "disk=b=mb.raw", "control=m.ctl",
                    name="m")
    ending, counter = threading.Event(), [0]

    def write():
        ha, hb = daemon.connect("a"), daemon.connect("b")
        while not ending.is_set():
            counter[0] += 1
            data = counter[0].to_bytes(8, "big") * 64
            ha.pwrite(data, 0)
            hb.pwrite(data, 0)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    chains = {"a": [], "b": []}
    try:
        for i in range(5):
            os.mkdir("night%d" % i)
            seen = counter[0]
            wait_for(lambda: counter[0] > seen + 5, "the writer")
            run_nbdferry("backup", "m.ctl", "night%d" % i, "--bitmap=m",
                         "--node=a", "--node=b")
            listed = json.loads(run_nbdferry("archive", "list", "--json",
                                             "night%d" % i).stdout)
            assert sorted(a["disk"] for a in listed) == ["a", "b"], listed
            assert len({a["point"] for a in listed}) == 1, listed
            numbers = {}
            for a in listed:
                chains[a["disk"]].append(a["file"])
                run_nbdferry("restore", *chains[a["disk"]], "r.raw")
                with open("r.raw", "rb") as f:
                    numbers[a["disk"]] = int.from_bytes(f.read(8), "big")
                os.unlink("r.raw")
            assert numbers["b"] <= numbers["a"] <= numbers["b"] + 1, numbers
        # They have their points in common, but not what builds upon what.
        for a in json.loads(run_nbdferry("archive", "list", "--json",
                                         *chains["a"], *chains["b"]).stdout):
            chain = chains[a["disk"]]
            i = chain.index(a["file"])
            assert a.get("builds-upon") == (chain[i - 1] if i else None), a
    finally:
        ending.set()
        thread.join(20)
    refused("several disks need several files", "backup", "m.ctl", "one.nbf",
            "--bitmap=m", "--node=a", "--node=b")
    run_nbdferry("backup", "m.ctl", "%n-100%%.nbf", "--bitmap=m", "--node=a",
                 "--node=b")
    assert os.path.exists("a-100%.nbf") and os.path.exists("b-100%.nbf")
    refused("say which one with --node", "backup", "m.ctl", "x.nbf",
            "--bitmap=m")
    daemon.stop()


chain_of_all_forms()
granularities()
a_trim_is_not_data()
two_disks_at_one_instant()
