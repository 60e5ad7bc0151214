#!/usr/bin/python3
# nbdferry - migrations whose disks fail
# SPDX-License-Identifier: BSD-3-Clause
"""A destination that is out of space pauses the migration, which goes on when
there is room; a source that cannot be read ends it, with the place named.
Needs root, for file systems of its own, which go away with a mount namespace
of its own."""

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "unshare", "mount")
if os.geteuid() != 0:
    skip("only root can mount")
if not own_mounts():
    skip("no mount namespaces")


def sh(*args):
    subprocess.run(args, check=True, stdin=subprocess.DEVNULL)


class Small(Move):
    """The destination's disk lies on a file system with little room."""

    def __init__(self):
        super().__init__()
        self.dst.stop()
        os.makedirs("small")
        sh("mount", "-t", "tmpfs", "-o", "size=4M", "none", "small")
        sh("rm", "-r", "dst-vda.raw", "dst-vda.raw.ferry")
        self.dst.args = ("incoming=on", "disk=vda=small/disk.raw",
                         "size=%d" % SIZE, "state=dst-vda.raw.ferry",
                         "control=dst.ctl")
        self.dst.start()


def out_of_space(by_hand):
    m = Small()
    m.qmp.command("migrate", uri=m.uri)
    info = m.pair.wait("postcopy-paused")
    assert "No space left" in info["error-desc"], info
    # It stays so, and the source serves.
    settle(m.writer, 100)
    assert m.info()["status"] in ("postcopy-paused", "active"), m.info()
    assert m.writer.errors == 0, m.writer.last_error
    m.refuses(m.dst)
    # Every attempt to go on is active for a moment, without a reason.
    wait_for(lambda: "reason" in run_nbdferry("status", "src.ctl").stdout,
             "the reason")
    sh("mount", "-o", "remount,size=64M", "small")
    if by_hand:
        run_nbdferry("migrate-recover", "src.ctl", check=False)
    info = m.pair.wait("completed")
    m.rest()
    m.qmp.close()
    m.pair.stop()
    sh("cp", "--sparse=always", "small/disk.raw", "dst-vda.raw")
    compare("dst-vda.raw", m.model)
    for name, granularity in BITMAPS.items():
        m.pair.check_bitmap("vda", name,
                            granules(m.touched, granularity, m.size))
    sh("umount", "-l", "small")
    print("out of space: %d pauses, %.1f MiB sent" % (
        info["x-ferry"]["pauses"], info["disk"]["transferred"] / MiB))


BAD = 5 * MiB + 3 * 512         # of which nobody can read 512 bytes

PRELOADED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

ssize_t
pread (int fd, void *buf, size_t n, off_t at)
{
  ssize_t (*real) (int, void *, size_t, off_t) = dlsym (RTLD_NEXT, "pread");
  const off_t bad = %d;

  if (n > 0 && at < bad + 512 && at + (off_t) n > bad &&
      access ("bad", F_OK) == 0) {
    errno = EIO;
    return -1;
  }
  return real (fd, buf, n, at);
}

ssize_t
pread64 (int fd, void *buf, size_t n, off_t at)
{
  return pread (fd, buf, n, at);
}
"""


def unreadable():
    if os.environ.get("FERRY_PRELOAD"):
        print("(not with a sanitizer)")
        return
    m = Move()
    m.rest()
    m.qmp.close()
    m.src.stop()
    with open("preload.c", "w") as f:
        f.write(PRELOADED % BAD)
    sh(*os.environ["FERRY_CC"].split(), "-shared", "-fPIC", "-o",
       "preload.so", "preload.c", "-ldl")
    m.src.env = {"LD_PRELOAD": os.path.abspath("preload.so"),
                 "PWD": os.getcwd()}
    # A place that holds data, or nobody would read it.
    with open("src-vda.raw", "r+b") as f:
        f.seek(4 * MiB)
        data = bytes(range(1, 256)) * (2 * MiB // 255)
        f.write(data)
    m.model.set(4 * MiB, data)
    m.src.start()
    m.qmp = m.pair.qmp = QMP("src.ctl")
    open("bad", "w").close()
    m.qmp.command("migrate", uri=m.uri)
    info = m.pair.wait("failed")
    assert ("'vda'" in info["error-desc"] and str(BAD) in info["error-desc"]
            and "src-vda.raw" in info["error-desc"]), info
    disk, = m.qmp.command("x-ferry-status")["disks"]
    assert (disk["mode"], disk["generation"]) == ("active", 0), disk
    m.refuses(m.dst)
    os.unlink("bad")
    assert read_all(m.src.uri("vda")) == bytes(m.model.data)
    m.qmp.command("migrate", uri=m.uri)
    m.pair.wait("completed")
    m.qmp.close()
    m.pair.stop()
    compare("dst-vda.raw", m.model)
    print("unreadable: %s" % info["error-desc"])


for test in (lambda: out_of_space(False), lambda: out_of_space(True),
             unreadable):
    started = time.monotonic()
    test()
    print("  %.1f s" % (time.monotonic() - started))
