#!/usr/bin/python3
# nbdferry - files that travel with a migration
# SPDX-License-Identifier: BSD-3-Clause
"""--attach: what the file held at the hold is what arrives; nothing is to be
seen before, and nothing is left of a migration that was cancelled."""

from ferrytest import *
from migratetest import *

requires("nbdkit")

MiB = 1 << 20
SIZE = 16 * MiB
THERE = "dst-vda.raw.ferry/attached"


def write(name, data):
    with open(name, "wb") as f:
        f.write(data)


def read(name):
    with open(name, "rb") as f:
        return f.read()


def there(folder=THERE):
    """{name: content}, without what is hidden."""
    return {n: read(os.path.join(folder, n)) for n in os.listdir(folder)
            if n[0] != "."}


def nothing(folder="dst-vda.raw.ferry"):
    found = [n for n in os.listdir(folder) if n.startswith("attached")]
    assert found == [], found


def attached(**files):
    return [{"name": n, "path": os.path.abspath(p)} for n, p in files.items()]


pair = Pair({"vda": SIZE})
big = os.urandom(5 * MiB + 17)
write("nvram", os.urandom(540672))
write("vm.xml", b"<domain/>")
write("empty", b"")
write("big", big)

# Refused, before anything is sent.
for files, says in (
        (attached(nvram="none"), "none"),
        (attached(**{"a/b": "nvram"}), "a/b"),
        (attached(**{"..": "nvram"}), ".."),
        (attached(**{".hidden": "nvram"}), ".hidden"),
        (attached(**{"": "nvram"}), "name"),
        (attached(nvram="/dev/zero"), "not a regular file"),
        (attached(a="nvram") * 2, "two"),
        ([{"name": "a", "path": "nvram"}], "absolute")):
    try:
        pair.qmp.command("migrate", uri=pair.dst.uri("vda"),
                         x_ferry_attach=files)
    except QMPError as e:
        assert says in str(e), e
        continue
    raise AssertionError("not refused: %s" % files)
with open("huge", "wb") as f:
    f.truncate((1 << 30) + 1)
try:
    pair.qmp.command("migrate", uri=pair.dst.uri("vda"),
                     x_ferry_attach=attached(huge="huge"))
    raise AssertionError("a file of more than 1 GiB")
except QMPError as e:
    assert "1073741825" in str(e), e
p = run_nbdferry("migrate", "src.ctl", pair.dst.uri("vda"), "--attach", "x",
                 check=False)
assert p.returncode == 2, p

# Cancelled: the destination has nothing.
files = attached(nvram="nvram", empty="empty", big="big")
pair.qmp.command("migrate-set-parameters", max_bandwidth=4 * MiB)
pair.qmp.command("migrate", uri=pair.dst.uri("vda"), x_ferry_attach=files)
wait_for(lambda: pair.qmp.command("query-migrate")["disk"]["transferred"] >
         6 * MiB, "the files and more")
assert os.path.isdir(THERE + ".incoming") and not os.path.exists(THERE)
pair.qmp.command("migrate-cancel")
pair.wait("cancelled")
nothing()

# Files that change while they and the disk are sent.
pair.qmp.command("migrate", uri=pair.dst.uri("vda"), x_ferry_attach=files)
wait_for(lambda: pair.qmp.command("query-migrate")["disk"]["transferred"] >
         6 * MiB, "the files and more")
write("nvram", os.urandom(100000))
with open("big", "r+b") as f:
    f.seek(3 * MiB)
    f.write(b"changed")
os.replace("vm.xml", "empty")
assert not os.path.exists(THERE)
pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
pair.wait("completed")
want = {n: read(n) for n in ("nvram", "empty", "big")}
assert there() == want, {n: len(v) for n, v in there().items()}
assert len(want["nvram"]) == 100000 and want["empty"] == b"<domain/>"
assert not os.path.exists(THERE + ".incoming")

# Back again by the command, with other files; then once more there: what came
# first is replaced as a whole.
pair.qmp.close()
pair.stop()
back = Nbdkit("disk=vda=src-vda.raw", "control=src.ctl", "incoming=on",
              name="src")
here = Nbdkit("disk=vda=dst-vda.raw", "control=dst.ctl", name="dst")
run_nbdferry("migrate", "dst.ctl", back.uri("vda"), "--attach",
             "one=nvram")
assert there("src-vda.raw.ferry/attached") == {"one": read("nvram")}
here.stop()
back.stop()
source = Nbdkit("disk=vda=src-vda.raw", "control=src.ctl", name="src")
again = Nbdkit("disk=vda=dst-vda.raw", "control=dst.ctl", "incoming=on",
               name="dst")
run_nbdferry("migrate", "src.ctl", again.uri("vda"), "--attach",
             "big=big", "--attach", "two=nvram")
assert there() == {"big": read("big"), "two": read("nvram")}
assert not os.path.exists(THERE + ".incoming")
source.stop()
again.stop()
