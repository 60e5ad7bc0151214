# nbdferry - what tests of the command share
# SPDX-License-Identifier: BSD-3-Clause
"""A fake QMP server, which answers as each test tells it to and writes down
what it was asked, and the command in a process of its own.
"""

import contextlib
import json
import socket
import subprocess
import tempfile
import threading
import unittest

from ferrytest import NBDFERRY, TMPDIR

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0},
                                "package": ""}, "capabilities": []}}
GiB = 1 << 30


class Refuse(Exception):
    """The answer is an error with this text."""


class Drop(Exception):
    """Close the connection instead of an answer."""


class Fake:
    """A QMP server; answers maps commands to values or to functions of the
    arguments.  .commands is what it was asked, with arguments, in order."""

    def __init__(self, greeting=GREETING, piecewise=False, **answers):
        self.path = tempfile.mktemp(".sock", dir=TMPDIR)
        self.greeting, self.piecewise = greeting, piecewise
        self.answers = {k.replace("_", "-"): v for k, v in answers.items()}
        self.answers.setdefault("qmp-capabilities", {})
        self.commands, self.connections = [], []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # close alone would not wake the thread that accepts
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=(connection,),
                                 daemon=True).start()

    def send(self, connection, message):
        data = message
        if not isinstance(message, bytes):
            data = json.dumps(message).encode() + b"\r\n"
        step = 7 if self.piecewise else max(len(data), 1)
        for i in range(0, len(data), step):
            connection.sendall(data[i:i + step])

    def event(self, name, **data):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                self.send(connection, {
                    "event": name, "data": data,
                    "timestamp": {"seconds": 1, "microseconds": 2}})

    def serve(self, connection):
        with connection, contextlib.suppress(OSError, Drop):
            if self.greeting is None:
                return
            self.send(connection, self.greeting)
            for line in connection.makefile("r", encoding="utf-8"):
                self.reply(connection, json.loads(line))

    def reply(self, connection, request):
        command, args = request["execute"], request.get("arguments", {})
        if command != "qmp_capabilities":
            self.commands.append((command, args))
        reply = {"id": request["id"]} if "id" in request else {}
        try:
            answer = self.answers[command.replace("_", "-")]
            reply["return"] = answer(args) if callable(answer) else answer
        except Refuse as e:
            reply["error"] = {"class": "GenericError", "desc": str(e)}
        except KeyError:
            reply["error"] = {"class": "CommandNotFound",
                              "desc": "not found: " + command}
        self.send(connection, reply)

    def names(self):
        return [name for name, _ in self.commands]


def info(status, **more):
    """An answer to query-migrate."""
    disk = {"transferred": 3 * GiB, "remaining": 4 * GiB, "total": 10 * GiB,
            "duplicate": 524288, "normal": 1, "normal-bytes": 3 * GiB,
            "dirty-pages-rate": 10 << 20, "mbps": 8589.934592,
            "dirty-sync-count": 2, "page-size": 4096}
    return {"status": status, "total-time": 12345, "setup-time": 3,
            "expected-downtime": 30, "disk": disk,
            "x-ferry": {"bitmap-bytes": 2048, "throttle-us": 0,
                        "longest-hold-us": 10}, **more}


class Migration:
    """A migration that goes through these answers, one for each query, and
    stays at the last one; cancelled by migrate-cancel."""

    def __init__(self, *infos, refuse_cancel=None, linger=1):
        self.infos, self.at = infos, -1
        self.refuse_cancel, self.linger = refuse_cancel, linger

    def query(self, _):
        self.at = min(self.at + 1, len(self.infos) - 1)
        return self.infos[self.at]

    def cancel(self, _):
        if self.refuse_cancel:
            raise Refuse(self.refuse_cancel)
        self.infos, self.at = ([info("cancelling")] * self.linger
                               + [info("cancelled")]), -1
        return {}

    def fake(self, **more):
        answers = {"migrate": {}, "migrate_set_parameters": {},
                   "query_migrate": self.query, "migrate_cancel": self.cancel}
        return Fake(**{**answers, **more})


def start(*args, **kwargs):
    return subprocess.Popen(
        [NBDFERRY, *args], text=True, encoding="utf-8",
        stdin=subprocess.DEVNULL, stdout=kwargs.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE, **kwargs)


def finish(p):
    """(status, out, err) of what start () has returned."""
    out, err = p.communicate(timeout=60)
    return p.returncode, out, err


def run(*args, **kwargs):
    return finish(start(*args, **kwargs))


class Case(unittest.TestCase):
    def expect(self, status, got, out=None, err=None):
        """Of run (): the status, and what out and err must contain; where
        nothing is to be there, there is nothing."""
        self.assertEqual(got[0], status, got)
        for what, text in (out, got[1]), (err, got[2]):
            if what:
                self.assertIn(what, text)
            elif what is None:
                self.assertEqual(text, "", got)
