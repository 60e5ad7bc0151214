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
HALF = 6 * MiB


def make():
    """Half of it text, the other half random."""
    rng = random.Random(1)
    words = [b"w%07d" % rng.randrange(10000) for _ in range(HALF // 8)]
    with open("src.raw", "wb") as f:
        f.write(b"".join(words))
        f.write(rng.randbytes(HALF))


def move(*options, **params):
    for f in "src.raw.ferry", "dst.raw.ferry":
        shutil.rmtree(f, ignore_errors=True)
    if os.path.exists("dst.raw"):
        os.unlink("dst.raw")
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    dst = Nbdkit("disk=vda=dst.raw", "incoming=on", "control=dst.ctl",
                 "size=%d" % (2 * HALF), name="dst")
    qmp = QMP("src.ctl")
    if params:
        qmp.command("migrate-set-parameters", **params)
    r = run_nbdferry("migrate", "src.ctl", dst.uri("vda"), "--json", *options)
    info = json.loads(r.stdout.splitlines()[-1])
    assert info["status"] == "completed", info
    now = qmp.command("query-migrate-parameters")
    qmp.close()
    src.stop()
    dst.stop()
    with open("src.raw", "rb") as a, open("dst.raw", "rb") as b:
        assert a.read() == b.read()
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
        assert got["raw-packets"] >= 12
    else:
        # Half of the packets pay, and nearly all bytes of them are text.
        assert got["packets"] >= 5 and got["raw-packets"] >= 5, got
        assert HALF * 0.9 < got["bytes-before"] < HALF * 1.2, got
        assert got["bytes-after"] < got["bytes-before"] * 0.6, got
    if ":" in "".join(options):
        method, level = options[0].split(":")
        assert now["multifd-compression"] == method
        assert now["multifd-%s-level" % method] == int(level), now
assert sizes["zlib:9"] < sizes["zlib"] < sizes["none"], sizes
assert sizes["zstd:12"] < sizes["zstd"] < sizes["none"], sizes

# The parameters, as QEMU names them.
src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
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
