#!/usr/bin/python3
# nbdferry - migrations over TLS
# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit --tls=require at the destination: packets, the handover, forwarding,
and a COMMIT that another process repeats, with keys and with certificates,
over TCP and a Unix socket.  Who cannot show the key, or shows a certificate
of another authority, moves nothing."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "psktool", "certtool")

MiB = 1 << 20
SIZE = 6 * MiB + 512


def tool(*args):
    p = subprocess.run(args, capture_output=True, text=True)
    if p.returncode != 0:
        raise RuntimeError("%s: %s" % (" ".join(args), p.stderr))


def here(*parts):
    return os.path.join(TMPDIR, *parts)


def make_psk(path):
    tool("psktool", "-u", "ferry", "-p", path)
    return here(path)


def make_certificates(folder):
    """An authority, and what a server and a client need."""
    os.mkdir(folder)

    def make(name, template, *args):
        path = here(folder, name)
        with open(path + ".tmpl", "w") as f:
            f.write(template)
        tool("certtool", "--generate-privkey", "--key-type=ecdsa",
             "--outfile", path + "-key.pem")
        tool("certtool", *args, "--load-privkey", path + "-key.pem",
             "--template", path + ".tmpl", "--outfile", path + "-cert.pem")
    make("ca", "cn = Test\nca\ncert_signing_key\n", "--generate-self-signed")
    by = ["--generate-certificate",
          "--load-ca-certificate", here(folder, "ca-cert.pem"),
          "--load-ca-privkey", here(folder, "ca-key.pem")]
    make("server", "cn = localhost\ndns_name = localhost\n"
         "ip_address = 127.0.0.1\ntls_www_server\nsigning_key\n", *by)
    make("client", "cn = client\ntls_www_client\nsigning_key\n", *by)
    return here(folder)


KEYS, WRONG_KEYS = make_psk("keys.psk"), make_psk("wrong.psk")
PKI, WRONG_PKI = make_certificates("pki"), make_certificates("wrong-pki")

PSK = ["--tls=require", "--tls-psk=" + KEYS]
X509 = ["--tls=require", "--tls-certificates=" + PKI, "--tls-verify-peer"]


class Secure(Nbdkit):
    """An nbdkit that takes nobody without TLS; uri () says how to come in."""

    def __init__(self, *args, query, user="", **kwargs):
        self.query, self.user = query, user
        super().__init__(*args, **kwargs)

    def uri(self, export="", query=None):
        export = urllib.parse.quote(export, safe="")
        query = query or self.query
        user = self.user + "@" if self.user else ""
        if self.port:
            return "nbds://%s127.0.0.1:%d/%s?%s" % (user, self.port, export,
                                                    query)
        return "nbds+unix://%s/%s?socket=%s&%s" % (user, export, self.socket,
                                                   query)


def connect_tls(uri):
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    assert h.get_tls_negotiated()
    return h


def read_tls(uri):
    h = connect_tls(uri)
    data = h.pread(SIZE, 0)
    h.shutdown()
    return bytes(data)


def one(name, options, query, user, tcp, wrong):
    """The whole way of a disk."""
    disk = name + "-src.raw"
    model = make_disk(disk, SIZE)
    src = Nbdkit("disk=d=" + disk, "control=src.ctl", name=name + "-src")
    run_nbdferry("bitmap", "add", "src.ctl", "b")
    dst = Secure("disk=d=%s-dst.raw" % name, "size=%d" % SIZE, "incoming=on",
                 "control=dst.ctl", name=name + "-dst", tcp=tcp,
                 options=options, query=query, user=user)
    writer = LoggingWriter(src.uri("d"), model, pause=0.002)
    settle(writer, 3)
    bare = ("nbd://127.0.0.1:%d/d" % dst.port if tcp
            else "nbd+unix:///d?socket=" + dst.socket)
    for uri in (bare, dst.uri("d", wrong)):
        p = run_nbdferry("migrate", "src.ctl", uri, check=False, timeout=30)
        print(name, p.returncode, p.stderr.strip().split("\n")[-1])
        assert p.returncode == 1, (uri, p)
        assert re.search("TLS|tls|handshake|gnutls|encrypt", p.stderr), p
    with open(name + "-dst.raw", "rb") as f:
        assert not any(f.read()), "something has moved without TLS"

    run_nbdferry("migrate", "src.ctl", dst.uri("d"))
    settle(writer, 20)           # forwarded, over TLS
    dst.kill()
    dst.start()
    settle(writer, 20)           # and again
    writer.stop()
    assert writer.errors == 0, writer.last_error
    assert read_tls(dst.uri("d")) == bytes(model.data)
    # Started again, the source repeats COMMIT and forwards, over TLS.
    src.kill()
    src.start()
    wait_for(lambda: status(src)["mode"] == "forwarding", "forwarding")
    assert read_all(src.uri("d")) == bytes(model.data)
    src.stop()
    dst.stop()
    got = bitmap_ranges(name + "-dst.raw.ferry/bitmaps.qcow2", "b")
    assert got == granules(writer.touched, 65536, SIZE)


def status(daemon, control="src.ctl"):
    disk, = json.loads(run_nbdferry("status", control, "--json")
                       .stdout)["disks"]
    return disk


def late_commit():
    """Both die as soon as the source has let go; its next process says COMMIT,
    over TLS, whether the first one could or not."""
    model = make_disk("late-src.raw", SIZE)
    src = Nbdkit("disk=d=late-src.raw", "control=src.ctl", name="late-src")
    dst = Secure("disk=d=late-dst.raw", "size=%d" % SIZE, "incoming=on",
                 "control=dst.ctl", name="late-dst", tcp=True, options=PSK,
                 query="tls-psk-file=" + KEYS, user="ferry")
    qmp = QMP("src.ctl")
    qmp.command("migrate", uri=dst.uri("d"))

    def gone():
        with open("late-src.raw.ferry/journal", "rb") as f:
            return b'"state": "gone"' in f.read()
    wait_for(gone, "the record that it is gone")
    dst.kill()
    src.kill()
    qmp.close()
    src.start()
    assert status(src)["mode"] == "gone"
    dst.start()
    wait_for(lambda: status(src)["mode"] == "forwarding", "the handover")
    assert status(dst, "dst.ctl")["generation"] == 1
    assert read_all(src.uri("d")) == bytes(model.data)
    src.stop()
    dst.stop()


one("psk-tcp", PSK, "tls-psk-file=" + KEYS, "ferry", True,
    "tls-psk-file=" + WRONG_KEYS)
one("psk-unix", PSK, "tls-psk-file=" + KEYS, "ferry", False,
    "tls-psk-file=" + WRONG_KEYS)
one("x509-tcp", X509, "tls-certificates=" + PKI, "", True,
    "tls-certificates=" + WRONG_PKI)
one("x509-unix", X509, "tls-certificates=" + PKI + "&tls-hostname=localhost",
    "", False, "tls-certificates=" + WRONG_PKI + "&tls-hostname=localhost")
late_commit()
