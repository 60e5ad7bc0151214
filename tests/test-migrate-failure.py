#!/usr/bin/python3
# nbdferry - migrations that fail, are cancelled, or outlive a daemon
# SPDX-License-Identifier: BSD-3-Clause
"""Destination killed, link cut or stalled, Ctrl-C, cancel at any moment: the
source is as it was, and a later migration is exact.  After one that has
completed either side is started again, and the disk moves back."""

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd")


def destination_killed():
    m = Move()
    m.no_resume()
    m.begin()
    m.dst.kill()
    p = m.pair.wait("failed", timeout=10)
    assert "destination" in p["error-desc"], p
    m.as_before()
    m.dst.start()
    m.refuses(m.dst)
    m.end()
    print("destination killed: %s" % p["error-desc"])


def link_cut():
    m = Move(proxy=True)
    m.no_resume()
    m.begin()
    m.proxy.cut()
    info = m.pair.wait("failed", timeout=10)
    assert "lost" in info["error-desc"], info
    m.as_before()
    # Nothing comes through at all.
    m.qmp.command("migrate", uri=m.uri)
    info = m.pair.wait("failed", timeout=10)
    assert str(m.proxy.port) in info["error-desc"], info
    m.as_before()
    m.proxy.mend()
    m.end()
    print("link cut: %s" % info["error-desc"])


def link_stalled():
    m = Move(proxy=True)
    m.begin()
    m.proxy.stall()
    sent = None

    def nothing_moves():
        nonlocal sent
        before, sent = sent, m.info()["disk"]["transferred"]
        settle(m.writer, 20)
        return before == sent

    pause_until(nothing_moves)
    began = time.monotonic()
    m.qmp.command("migrate-cancel")
    m.pair.wait("cancelled", timeout=8)
    took = time.monotonic() - began
    m.as_before()
    # And before it has begun.
    m.qmp.command("migrate", uri=m.uri)
    settle(m.writer, 20)
    assert m.info()["status"] == "setup", m.info()
    m.qmp.command("migrate-cancel")
    m.pair.wait("cancelled", timeout=8)
    m.proxy.stall(False)
    m.as_before()
    m.end()
    print("link stalled: cancelled in %.1f s" % took)


def stalled_while_held():
    """The link stalls in the handover, before anything is decided: requests
    are not held for long, and all goes on."""
    m = Move(proxy=True, size=8 * MiB)
    m.no_resume()
    m.rest()
    m.writer = LoggingWriter(m.src.uri("vda"), m.model, seed=77,
                             max_length=16384, pause=0.01)
    # What is left is sent slowly while requests are held.
    m.qmp.command("migrate-set-parameters", max_bandwidth=4 * MiB,
                  downtime_limit=1000)
    m.qmp.command("migrate", uri=m.uri)
    while m.qmp.event("MIGRATION")["data"]["status"] != "device":
        pass
    m.proxy.stall()
    began, done = time.monotonic(), m.writer.done
    # Some requests may still have been on their way.
    wait_for(lambda: m.writer.done >= done + 10, "held requests", 12)
    took = time.monotonic() - began
    settle(m.writer, 10)
    status = m.info()["status"]
    assert status in ("active", "failed", "device", "completed"), status
    m.proxy.stall(False)
    if status != "completed":
        wait_for(lambda: m.info()["status"] in ("failed", "completed"),
                 "the end", 10)
    if m.info()["status"] == "completed":
        m.rest()
        m.qmp.close()
        m.pair.stop()
        m.check()
    else:
        m.as_before()
        m.qmp.command("migrate-set-parameters", downtime_limit=30)
        m.end()
    print("stalled in the handover: requests held for %.1f s, %s" % (
        took, status))


def ctrl_c():
    m = Move()
    p = subprocess.Popen(
        [NBDFERRY, "migrate", "src.ctl", m.uri, "--max-bandwidth", "8M"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: m.info().get("status") == "active" and
             m.info()["disk"]["remaining"] < 0.8 * SIZE, "a part of it")
    p.send_signal(signal.SIGINT)
    output = p.communicate(timeout=10)[0]
    assert p.returncode == 130, (p.returncode, output)
    assert "was cancelled; the source is as it was" in output, output
    assert m.info()["status"] == "cancelled"
    m.as_before()
    m.refuses(m.dst, "destination of a migration")
    m.end()
    print("Ctrl-C")


def resources(daemon):
    """Threads and files."""
    proc = "/proc/%d/" % daemon.process.pid
    return len(os.listdir(proc + "task")), len(os.listdir(proc + "fd"))


def cancelled_often():
    m = Move(size=8 * MiB)
    rng = random.Random(4)
    before, statuses = None, []
    for i in range(22):
        m.qmp.command("migrate-set-parameters", max_bandwidth=4 * MiB,
                      multifd_channels=rng.randint(1, 8))
        m.qmp.command("migrate", uri=m.uri)
        moment = time.monotonic() + rng.choice([0, 0.01, 0.05, 0.3]) * (
            rng.random())
        pause_until(lambda: time.monotonic() >= moment)
        statuses.append(m.info()["status"])
        m.qmp.command("migrate-cancel")
        m.pair.wait("cancelled", timeout=10)
        if i == 1:              # what is made once is there
            m.rest()
            before = [resources(d) for d in (m.src, m.dst)]
            m.write()
    m.as_before()
    m.rest()

    def as_few():
        now = [resources(d) for d in (m.src, m.dst)]
        return all(a <= b for x, y in zip(now, before)
                   for a, b in zip(x, y)) and now

    try:
        wait_for(as_few, "threads and files to go", 5)
    except TimeoutError:
        raise AssertionError("leaked: %s before, now %s" % (
            before, [resources(d) for d in (m.src, m.dst)])) from None
    m.write()
    m.end()
    print("cancelled %d times, in %s" % (
        len(statuses), {s: statuses.count(s) for s in set(statuses)}))


def restarts():
    """Either side is started again after the handover."""
    m = Move()
    m.complete()
    m.rest()
    # The destination, while nobody is connected.
    m.dst.stop()
    m.check()
    m.dst.start()
    m.write(m.dst)
    m.rest()
    assert read_all(m.dst.uri("vda")) == bytes(m.model.data)
    # Through the source that was there all the time.
    m.write(m.src)
    m.rest()
    # The source.
    m.qmp.close()
    m.src.stop()
    m.src.start()

    def forwards():
        try:
            m.src.connect("vda").shutdown()
            return True
        except nbd.Error:
            return False

    wait_for(forwards, "the source to forward", 10)
    m.write(m.src)
    m.rest()
    assert read_all(m.src.uri("vda")) == bytes(m.model.data)
    # The source, killed, and started while the destination is down.
    m.src.kill()
    m.dst.stop()
    m.check()
    m.src.start()
    m.refuses(m.src, "127.0.0.1:%d" % m.dst.port)
    qmp = QMP("src.ctl")
    disk, = qmp.command("x-ferry-status")["disks"]
    assert disk["mode"] == "gone" and str(m.dst.port) in disk["peer"], disk
    try:
        qmp.command("block-dirty-bitmap-add", node="vda", name="late")
        raise AssertionError("a disk that is gone got a bitmap")
    except QMPError as e:
        assert "handed over" in str(e), e
    qmp.close()
    m.dst.start()
    wait_for(forwards, "the source to forward again", 15)
    m.write(m.src)
    m.rest()
    back(m)


def back(m):
    """The disk returns to where it came from."""
    m.src.stop()
    m.src.args += ("incoming=on",)
    m.src.start()
    m.refuses(m.src)
    m.write(m.dst)
    run_nbdferry("migrate", "dst.ctl", m.src.uri().rstrip("/"))
    m.rest()
    m.write(m.src)              # it is active here, and there it forwards
    m.rest()
    for control, mode in ("src.ctl", "active"), ("dst.ctl", "forward"):
        qmp = QMP(control)
        disk, = qmp.command("x-ferry-status")["disks"]
        assert disk["mode"].startswith(mode), disk
        assert disk["generation"] == 2 or mode == "forward", disk
        qmp.close()
    assert read_all(m.dst.uri("vda")) == bytes(m.model.data)
    m.pair.stop()
    m.check("src")
    print("either side was started again, and the disk moved back")


for test in (destination_killed, link_cut, link_stalled, stalled_while_held,
             ctrl_c, cancelled_often, restarts):
    started = time.monotonic()
    test()
    print("  %.1f s" % (time.monotonic() - started))
