#!/usr/bin/python3
# nbdferry - the recipes, as they stand in docs/recipes.md
# SPDX-License-Identifier: BSD-3-Clause
"""Every ```sh block of the page is run, in their order, and so is what the
units start; systemd finds nothing wrong with the units.  Folders, the standby's
address and the programs are put in the place of those on the page."""

from ferrytest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "nbdinfo", "psktool")

MiB = 1 << 20
SIZE = 64 * MiB
ROOT = os.path.join(TMPDIR, "r")
PORT = free_port()
FOLDERS = "/run/nbdferry-vda", "/srv", "/backup", "/etc/nbdferry", "/bin"

with open(os.path.join(os.environ["srcdir"], "docs/recipes.md")) as f:
    PAGE = f.read()


def here(text):
    """With our folders and servers in the place of the page's."""
    text = text.replace("/usr/bin/", "").replace("%i", "vda")
    for folder in FOLDERS[:-1]:
        text = re.sub(r"(?<![\w.-])" + folder + r"(?![\w-])", ROOT + folder,
                      text)
    text = text.replace(" ferry disk=", " %s disk=" % PLUGIN)
    return text.replace("standby.example", "127.0.0.1:%d" % PORT)


def run(script):
    if "nbdferry backup" in script:     # their names have the second in them
        second = int(time.time())
        wait_for(lambda: int(time.time()) != second, "the next second")
    env = dict(os.environ, PATH="%s/bin:%s" % (ROOT, os.environ["PATH"]))
    p = subprocess.run(["bash", "-euo", "pipefail", "-c", script], text=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                       timeout=60)
    print("$ %s\n%s" % (script.strip(), p.stdout))
    if p.returncode != 0:
        raise RuntimeError("exit status %d:\n%s\n%s" % (
            p.returncode, script, p.stdout))
    return p.stdout


def units():
    """Each ini block that is a file of systemd's: name, text."""
    for text in re.findall(r"```ini\n(.*?)```", PAGE, re.S):
        yield re.match(r"# /etc/systemd/system/(\S+)\n", text)[1], text


def started_by(unit):
    text = dict(units())[unit]
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    return here(command)


for folder in FOLDERS:
    os.makedirs(ROOT + folder)
os.symlink(NBDFERRY, ROOT + "/bin/nbdferry")
with open(ROOT + "/bin/nbdkit", "w") as f:
    f.write("#!/bin/sh\nexec env LD_PRELOAD='%s' ASAN_OPTIONS=detect_leaks=0:"
            "verify_asan_link_order=0 %s \"$@\"\n" % (
        "libp11-kit.so.0 " + PRELOAD if PRELOAD else "",
        shutil.which("nbdkit")))
os.chmod(ROOT + "/bin/nbdkit", 0o755)
make_disk(ROOT + "/srv/vda.raw", SIZE)
subprocess.run(["psktool", "-u", "source", "-p",
                ROOT + "/etc/nbdferry/keys.psk"], check=True,
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

# The units are what systemd takes, and each that is named is there.
names = dict(units())
assert set(names) == {"nbdferry@.service", "nbdferry-backup@.service",
                      "nbdferry-backup@.timer", "nbdferry-sync@.service",
                      "nbdferry-sync@.timer"}, names
if shutil.which("systemd-analyze"):
    os.makedirs("units")
    for name, text in names.items():
        with open("units/" + name, "w") as f:
            # Programs that are not installed here are no fault of theirs.
            f.write(text.replace("/usr/bin/", "/bin/true "))
    p = subprocess.run(["systemd-analyze", "verify", "--man=no",
                        *("units/" + n.replace("@", "@vda") for n in names)],
                       text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT,
                       env=dict(os.environ,
                                SYSTEMD_UNIT_PATH=os.path.abspath("units")
                                + ":"))
    ours = [line for line in p.stdout.splitlines() if "nbdferry" in line]
    assert not ours, "\n".join(ours)

pidfiles = [ROOT + "/run/nbdferry-vda/pid"]
standby = Nbdkit("disk=vda=" + ROOT + "/srv/standby.raw", "size=%d" % SIZE,
                 port=PORT, name="standby",
                 options=["--tls=require",
                          "--tls-psk=" + ROOT + "/etc/nbdferry/keys.psk"])
writes = 0


def write():
    """Something changes between two recipes."""
    global writes
    writes += 1
    h = connect("nbd+unix:///vda?socket=%s/run/nbdferry-vda/nbd" % ROOT)
    h.pwrite(os.urandom(MiB), writes * 3 * MiB)
    h.zero(65536, 40 * MiB + writes * MiB)
    h.shutdown()


try:
    run(started_by("nbdferry@.service"))
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 13, len(blocks)
    for script in blocks:
        if "overlays --incremental" in script:
            write()
        # What a timer would have started before.
        if "audit" in script:
            chain = run('ls "$PWD"/backup/vda/*.nbf').split()
            assert len(chain) == 3, chain
        if "standby.example" in script:
            run(started_by("nbdferry-sync@.service"))
            if "sync" in script:
                write()
        elif "--full" in script:
            run("mkdir -p backup/vda; " +
                started_by("nbdferry-backup@.service"))
            os.unlink(run('ls "$PWD"/backup/vda/*.nbf').split()[0])
        out = run(here(script))
        if "archive merge" in script:
            os.unlink(ROOT + "/backup/vda-merged.nbf")
            write()
            run(started_by("nbdferry-backup@.service"))
        if "new.raw" in script:
            run("nbdferry verify srv/new.raw "
                "'nbd+unix:///vda?socket=%s/run/nbdferry-vda/nbd'" % ROOT)
    # The overlay is the disk as it is now, but for what came after.
    run("nbdferry verify 'nbd+unix:///vda?socket=%s/run/nbdferry-vda/nbd' "
        "'nbds://source@127.0.0.1:%d/vda?tls-psk-file=%s'" % (
            ROOT, PORT, ROOT + "/etc/nbdferry/keys.psk"))
    with open(ROOT + "/backup/nightly.svg") as f:
        assert "</svg>" in f.read()
finally:
    for pidfile in pidfiles + [ROOT + "/backup/overlays/pid"]:
        try:
            with open(pidfile) as f:
                os.kill(int(f.read()), signal.SIGTERM)
        except (OSError, ValueError):
            pass
standby.stop()
