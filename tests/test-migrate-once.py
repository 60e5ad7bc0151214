#!/usr/bin/python3
# nbdferry - what is said for one migration holds for it alone
# SPDX-License-Identifier: BSD-3-Clause
"""The mapping of a migration is kept over a restart of the source, and not
taken for the parameter; a parameter is one again.  What cannot go on cannot be
paused."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img")

SIZE = 4 << 20


def restarted(pair):
    """Paused, killed and started again."""
    pair.wait("active")
    run_nbdferry("migrate-pause", "src.ctl")
    pair.wait("postcopy-paused")
    pair.src.kill()
    pair.src.start()
    pair.qmp = QMP("src.ctl")
    return pair.qmp.command("query-migrate-parameters").get(
        "block-bitmap-mapping")


def own_mapping():
    pair = Pair({"vda": SIZE})
    pair.add("vda", "b", 65536)
    h = pair.src.connect("vda")
    h.pwrite(b"x" * 512, 512)
    pair.models["vda"].set(512, b"x" * 512)
    h.shutdown()
    run_nbdferry("migrate", "src.ctl", pair.dst.uri("vda"), "--no-bitmaps",
                 "--max-bandwidth", "64K", "--no-wait")
    assert restarted(pair) is None
    pair.qmp.command("migrate-recover")
    pair.wait("active", "postcopy-paused")
    # It goes on without them; the one after it takes them.
    pair.qmp.command("migrate-cancel")
    pair.wait("cancelled")
    run_nbdferry("migrate", "src.ctl", pair.dst.uri("vda"),
                 "--max-bandwidth", "0")
    pair.qmp.close()
    pair.stop()
    pair.check_disk("vda")
    pair.check_bitmap("vda", "b", [(0, 65536)])


def parameter():
    pair = Pair({"vda": SIZE})
    mapping = [{"node-name": "vda", "alias": "vda",
                "bitmaps": [{"name": "b", "alias": "c"}]}]
    pair.add("vda", "b", 65536)
    pair.qmp.command("migrate-set-parameters", block_bitmap_mapping=mapping,
                     max_bandwidth=65536)
    pair.qmp.command("migrate", uri=pair.dst.uri("vda"))
    assert restarted(pair) == mapping
    pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
    pair.qmp.command("migrate-recover")
    pair.wait("completed")
    pair.qmp.close()
    pair.stop()
    pair.check_disk("vda")
    pair.check_bitmap("vda", "c", [])


def not_resumed():
    pair = Pair({"vda": SIZE})
    run_nbdferry("migrate", "src.ctl", pair.dst.uri("vda"), "--no-resume",
                 "--max-bandwidth", "64K", "--no-wait")
    pair.wait("active")
    r = run_nbdferry("migrate-pause", "src.ctl", check=False)
    assert r.returncode == 1 and "--no-resume" in r.stderr, r
    assert pair.qmp.command("query-migrate")["status"] == "active"
    pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
    pair.wait("completed")
    r = run_nbdferry("migrate-cancel", "src.ctl", check=False)
    assert r.returncode == 1 and "completed before" in r.stderr, r
    assert r.stdout == "", r
    pair.qmp.close()
    pair.stop()
    pair.check_disk("vda")


for test in own_mapping, parameter, not_resumed:
    print("== %s" % test.__name__, flush=True)
    Nbdkit.all.clear()
    clear_folder()
    test()
