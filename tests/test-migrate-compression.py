#!/usr/bin/python3
# nbdferry - compression in a migration, and what is given up of it
# SPDX-License-Identifier: BSD-3-Clause

import json
import random
import shutil

from ferrytest import *
from migratetest import *

requires("nbdkit")

MiB = 1 << 20
SIZE = 6 * MiB


def make():
    """Text on one disk, noise on the other: a packet is of one disk, so what
    pays does not depend on how large packets are (which the link decides)."""
    rng = random.Random(1)
    words = [b"w%07d" % rng.randrange(10000) for _ in range(SIZE // 8)]
    with open("text.raw", "wb") as f:
        f.write(b"".join(words))
    with open("noise.raw", "wb") as f:
        f.write(rng.randbytes(SIZE))


def source():
    return Nbdkit("disk=text=text.raw", "disk=noise=noise.raw",
                  "control=src.ctl", name="src")


def move(*options):
    for f in "text", "noise":
        shutil.rmtree(f + ".raw.ferry", ignore_errors=True)
        shutil.rmtree(f + ".new.ferry", ignore_errors=True)
        if os.path.exists(f + ".new"):
            os.unlink(f + ".new")
    size = "size=%d" % SIZE
    src = source()
    dst = Nbdkit("disk=text=text.new", size, "disk=noise=noise.new", size,
                 "incoming=on", "control=dst.ctl", name="dst")
    r = run_nbdferry("migrate", "src.ctl", dst.uri().rstrip("/"), "--json",
                     *options)
    info = json.loads(r.stdout.splitlines()[-1])
    assert info["status"] == "completed", info
    qmp = QMP("src.ctl")
    now = qmp.command("query-migrate-parameters")
    qmp.close()
    src.stop()
    dst.stop()
    for f in "text", "noise":
        with open(f + ".raw", "rb") as a, open(f + ".new", "rb") as b:
            assert a.read() == b.read(), f
    return info, now


make()
sizes = {}
for options in (), ("zlib",), ("zstd",), ("zlib:9",), ("zstd:12",), ("zlib:0",):
    args = ("--compression",) + options if options else ()
    info, now = move(*args)
    got = info["x-ferry"]["compression"]
    sizes[options[0] if options else "none"] = info["disk"]["transferred"]
    print(options, info["disk"]["transferred"], got)
    if options in ((), ("zlib:0",)):
        assert got["packets"] == 0 and got["bytes-before"] == 0, got
        assert got["raw-packets"] >= 2
    else:
        # The packets with text pay, and no others.
        assert got["packets"] >= 1 and got["raw-packets"] >= 1, got
        assert got["bytes-before"] == SIZE, got
        assert got["bytes-after"] < SIZE * 0.6, got
    if ":" in "".join(options):
        method, level = options[0].split(":")
        assert now["multifd-compression"] == method
        assert now["multifd-%s-level" % method] == int(level), now
assert sizes["zlib:9"] < sizes["zlib"] < sizes["none"], sizes
assert sizes["zstd:12"] < sizes["zstd"] < sizes["none"], sizes

# The parameters, as QEMU names them.
src = source()
qmp = QMP("src.ctl")
for name, most in ("zlib", 9), ("zstd", 20):
    name = "multifd-%s-level" % name
    qmp.command("migrate-set-parameters", **{name: most})
    assert qmp.command("query-migrate-parameters")[name] == most
    qmp.command("migrate-set-parameters", **{name: 1})
    assert qmp.command("query-migrate-parameters")[name] == 1
    for bad in most + 1, -1, "1":
        try:
            qmp.command("migrate-set-parameters", **{name: bad})
            raise AssertionError("accepted: %s %s" % (name, bad))
        except QMPError as e:
            assert name in str(e), e
for bad in "zstd:21", "zlib:10", "none:1", "zstd:", "zstd:x", "lz4", "":
    r = run_nbdferry("migrate", "src.ctl", "nbd://nowhere", "--compression",
                     bad, check=False)
    assert r.returncode == 2 and "--compression" in r.stderr, r
