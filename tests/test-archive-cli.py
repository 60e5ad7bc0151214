#!/usr/bin/python3
# nbdferry - archives on the command line: damage, order, targets
# SPDX-License-Identifier: BSD-3-Clause
"""A damaged, cut, foreign or misplaced archive is refused before a byte is
written; so is a target that holds something or is too small."""

from ferrytest import *
from chaintest import *

requires("nbdkit", "qemu-img")

MiB = 1 << 20
SIZE = 64 * 1024


def write_file(path, data):
    with open(path, "wb") as f:
        f.write(data)


def read_file(path):
    with open(path, "rb") as f:
        return f.read()


def make_chain():
    """full.nbf, i1.nbf, i2.nbf, and what the disk was at each."""
    disk = Disk(SIZE, name="c", step=4096)
    models = []
    for out in "full.nbf", "i1.nbf", "i2.nbf":
        # The same command each night, but for what says that it is no first.
        backup(disk, out, "--bitmap=c", "--granularity=4K",
               *[] if out == "full.nbf" else ["--incremental"])
        models.append(disk.snapshot())
        disk.write(4, max_length=4096)
    refused("granularity of 4 KiB, not 64 KiB", "backup", disk.control,
            "no.nbf", "--bitmap=c", "--granularity=64K")
    assert not os.path.exists("no.nbf")
    disk.stop()
    return models


def small_archive():
    """An incremental of a few hundred bytes."""
    disk = Disk(SIZE, name="s", step=4096)
    backup(disk, "s0.nbf", "--bitmap=s", "--granularity=512")
    h = disk.daemon.connect("vda")
    h.pwrite(b"x" * 512, 4096)
    h.zero(512, 8192)
    h.shutdown()
    backup(disk, "s1.nbf", "--bitmap=s", "--compression=none")
    disk.stop()
    return read_file("s1.nbf")


def refused_and_untouched(data):
    write_file("bad.nbf", data)
    p = run_nbdferry("archive", "verify", "bad.nbf", check=False)
    assert p.returncode == 1 and "bad.nbf" in p.stderr, p
    p = run_nbdferry("restore", "s0.nbf", "bad.nbf", "bad.raw", check=False)
    assert p.returncode == 1, p
    assert not [f for f in os.listdir(".") if f.startswith("bad.raw")]


def damage():
    good = small_archive()
    step = 1 if os.environ.get("CHECK_LONG") else 13
    for at in range(0, len(good), step):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        refused_and_untouched(bad)
    for n in range(0, len(good), step * 2):
        refused_and_untouched(good[:n])
    refused_and_untouched(good + b"\0")
    # Where, and what.
    bad = bytearray(good)
    bad[-1100] ^= 1                     # in the payload of packet 1
    write_file("bad.nbf", bad)
    p = refused("payload's checksum", "archive", "verify", "bad.nbf")
    assert "(packet 1)" in p.stderr, p.stderr
    p = run_nbdferry("archive", "verify", "--json", "s0.nbf", "bad.nbf",
                     check=False)
    assert [e["ok"] for e in json.loads(p.stdout)] == [True, False], p.stdout
    # A file that is still being written, or was cut.
    write_file("bad.nbf", good[:-1])
    listed = json.loads(run_nbdferry("archive", "list", "--json",
                                     "bad.nbf").stdout)
    assert listed[0]["complete"] is False, listed
    assert "INCOMPLETE" in run_nbdferry("archive", "list", "bad.nbf").stdout
    # Nor is it one with the end of another one.
    refused_and_untouched(read_file("s0.nbf") + good)
    assert "INCOMPLETE" in run_nbdferry("archive", "list", "bad.nbf").stdout
    os.unlink("bad.nbf")


def order(models):
    chain = ["full.nbf", "i1.nbf", "i2.nbf"]
    for i in range(3):
        restore(chain[:i + 1], models[i])
    refused("a gap", "restore", "full.nbf", "i2.nbf", "x.raw")
    refused("wrong order", "restore", "full.nbf", "i2.nbf", "i1.nbf", "x.raw")
    refused("is a full backup", "restore", "i1.nbf", "full.nbf", "x.raw")
    refused("another disk", "restore", "full.nbf", "s1.nbf", "x.raw")
    refused("the same point", "restore", "full.nbf", "full.nbf", "x.raw")
    refused("not a full backup", "restore", "i1.nbf", "i2.nbf", "x.raw")
    refused("not an archive", "restore", "/dev/null", "x.raw")
    refused("wrong magic", "restore", "c.raw", "x.raw")
    refused("No such file", "restore", "none.nbf", "x.raw")
    refused("a gap", "archive", "merge", "full.nbf", "i2.nbf", "m.nbf")
    refused("a gap", "archive", "verify", "--chain", "full.nbf", "i2.nbf")
    for last in "i1.nbf", "i2.nbf":
        p = run_nbdferry("archive", "verify", "--chain", "--json", "full.nbf",
                         last, check=False)
        *files, chain_ok = json.loads(p.stdout)
        assert [f["ok"] for f in files] == [True, True], p
        assert chain_ok["chain-ok"] == (p.returncode == 0) == (
            last == "i1.nbf") == ("gap" not in chain_ok.get("error", "")), p
    refused("exists already", "archive", "merge", "full.nbf", "i1.nbf",
            "i2.nbf")
    run_nbdferry("archive", "merge", "full.nbf", "i1.nbf", "full.nbf",
                 "--force")         # onto one that it reads
    restore(["full.nbf", "i2.nbf"], models[2])
    assert not [f for f in os.listdir(".") if f.startswith(("x.raw", "m.nbf"))]


def onto(models):
    """Incrementals onto an image that is at their parent's point."""
    point = info("full.nbf")["point"]   # now that of i1
    run_nbdferry("restore", "full.nbf", "image.raw")
    refused("exists already", "restore", "full.nbf", "image.raw")
    refused("exists already", "restore", "full.nbf", "i2.nbf", "image.raw")
    refused("onto what is there", "restore", "full.nbf", "image.raw",
            "--incremental")
    refused("builds upon the point", "restore", "i2.nbf", "image.raw",
            "--onto-point", info("i2.nbf")["point"])
    compare("image.raw", models[1])
    run_nbdferry("restore", "i2.nbf", "image.raw", "--onto-point", point)
    compare("image.raw", models[2])
    refused("does not exist", "restore", "i2.nbf", "none.raw",
            "--incremental")
    write_file("longer.raw", bytes(SIZE + 512))
    refused("not an image of it", "restore", "i2.nbf", "longer.raw",
            "--incremental")
    run_nbdferry("restore", "full.nbf", "longer.raw", "--overwrite")
    compare("longer.raw", models[1])


def from_stdin(models):
    def restore_stdin(*args, data):
        return subprocess.run([NBDFERRY, "restore", "-", *args], input=data,
                              capture_output=True, timeout=60)

    data = read_file("full.nbf")
    assert restore_stdin("in.raw", data=data).returncode == 0
    compare("in.raw", models[1])
    p = restore_stdin("in.raw", data=data)
    assert p.returncode == 1 and b"save the archive" in p.stderr, p
    bad = data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]
    for bytes_ in data[:-1], bad:
        p = restore_stdin("in2.raw", data=bytes_)
        assert p.returncode == 1, p
        assert not [f for f in os.listdir(".") if f.startswith("in2")]
    p = restore_stdin("i1.nbf", "in2.raw", data=data)
    assert p.returncode == 1 and b"the one archive" in p.stderr, p


def servers(models):
    memory = Nbdkit("%d" % (SIZE - 512), plugin="memory", name="small")
    refused("less than the", "restore", "full.nbf", memory.uri())
    memory.stop()
    memory = Nbdkit("%d" % (SIZE + 4096), plugin="memory", name="memory")
    run_nbdferry("restore", "full.nbf", memory.uri())
    assert read_all(memory.uri())[:SIZE] == bytes(models[1].data)
    refused("is not empty", "restore", "full.nbf", memory.uri())
    run_nbdferry("restore", "i2.nbf", memory.uri(), "--incremental")
    assert read_all(memory.uri()) == bytes(models[2].data) + bytes(4096)
    run_nbdferry("restore", "full.nbf", memory.uri(), "--overwrite",
                 "--connections=1")
    assert read_all(memory.uri()) == bytes(models[1].data) + bytes(4096)
    memory.stop()


def a_known_signature():
    """What is recognised is named."""
    with open("ext4.raw", "wb") as f:
        f.truncate(8 * MiB)
    if subprocess.run(["sh", "-c", "mkfs.ext4 -q -F ext4.raw"],
                      stderr=subprocess.DEVNULL).returncode != 0:
        return
    server = Nbdkit("ext4.raw", plugin="file", name="ext4")
    refused("ext4", "restore", "full.nbf", server.uri())
    server.stop()


def listing():
    names = [e["file"] for e in json.loads(
        run_nbdferry("archive", "list", "--json", ".").stdout)]
    assert {"./full.nbf", "./i2.nbf", "./s0.nbf", "./s1.nbf"} <= set(names)
    text = run_nbdferry("archive", "list", "s1.nbf", "s0.nbf").stdout
    lines = text.splitlines()
    assert lines[1].startswith("s0.nbf") and lines[1].endswith("full"), text
    assert lines[2].startswith("s1.nbf") and lines[2].endswith("s0.nbf"), text
    for command in "list", "info":
        # Standard input is as good as a file if it is one.
        with open("s1.nbf", "rb") as f:
            e, = json.loads(subprocess.run(
                [NBDFERRY, "archive", command, "--json", "-"], stdin=f,
                capture_output=True, check=True).stdout)
        assert e["complete"], e
        p = subprocess.run([NBDFERRY, "archive", command, "-"],
                           input=read_file("s1.nbf"), capture_output=True)
        assert p.returncode == 1 and b"needs a file" in p.stderr, p
        p = run_nbdferry("archive", command, "--json", "s1.nbf", "none.nbf",
                         check=False)
        good, bad = json.loads(p.stdout)
        assert p.returncode == 1 and good["complete"], p
        assert bad["file"] == "none.nbf" and "No such" in bad["error"], p
    assert "(not listed)" in run_nbdferry("archive", "list", "s1.nbf").stdout


def sparse(models):
    """A restored file has the disk's holes."""
    disk = Disk(16 * MiB, name="h", step=4 * MiB)
    backup(disk, "h.nbf", "--bitmap=h")
    for extra in (), ("--overwrite",):
        run_nbdferry("restore", "h.nbf", "h-out.raw", *extra)
        assert os.stat("h-out.raw").st_blocks * 512 <= 8 * MiB + 65536
        compare("h-out.raw", disk.model)
    nothing_is_written_before_all_is_right(disk)
    # The disk itself, which is in use.
    refused("h.raw", "restore", "h.nbf", "h.raw", "--overwrite")
    refused("h.raw", "restore", "h1.nbf", "h.raw", "--incremental")
    refused("h.raw", "backup", disk.control, "h.raw", "--bitmap=h",
            "--format=raw")
    for export in "vda", "":
        refused("is the disk itself", "backup", disk.control,
                disk.daemon.uri(export), "--bitmap=h", "--incremental")
    assert read_all(disk.daemon.uri("vda")) == bytes(disk.model.data)
    disk.stop()


def nothing_is_written_before_all_is_right(disk):
    """Damage at the very end, behind much that is right."""
    before = disk.snapshot()
    disk.write(50, max_length=MiB)
    backup(disk, "h1.nbf", "--bitmap=h", "--compression=none")
    bad = bytearray(read_file("h1.nbf"))
    assert len(bad) > 8 * MiB, len(bad)
    bad[-900] ^= 4
    write_file("h1-bad.nbf", bad)
    refused("h1-bad.nbf: at byte", "restore", "h1-bad.nbf", "h-out.raw",
            "--incremental")
    compare("h-out.raw", before)
    run_nbdferry("restore", "h1.nbf", "h-out.raw", "--incremental")
    compare("h-out.raw", disk.model)


the_models = make_chain()
damage()
order(the_models)
onto(the_models)
from_stdin(the_models)
servers(the_models)
a_known_signature()
listing()
sparse(the_models)
