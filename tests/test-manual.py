#!/usr/bin/python3
# nbdferry - the manual says what the programs can do, no less and no more
# SPDX-License-Identifier: BSD-3-Clause
"""Each option that a command's --help lists is in the man page, in its part or
under OPTIONS, and each that a man page lists is one; each parameter of the
plugin, too; and control.md has every command of the control socket."""

from ferrytest import *

requires("nbdkit")

SRC = os.environ["srcdir"]
OPTION = re.compile(r"--[a-z][a-z-]*")
BACKUP = "backup", "restore", "archive"
PAGES = {"nbdferry": "cli/nbdferry.pod",
         "nbdferry-backup": "cli/nbdferry-backup.pod"}


def read(path):
    with open(os.path.join(SRC, path), encoding="utf-8") as f:
        return f.read()


def help_of(*words):
    return run_nbdferry(*words, "--help").stdout


def commands():
    """Each command that takes options, as words: ("bitmap", "add")."""
    def below(*words):
        part = help_of(*words).partition("\nCommands:\n")[2]
        names = re.findall(r"^  ([a-z][a-z-]*) ", part.partition("\n\n")[0],
                           re.M)
        for name in names:
            yield from below(*words, name)
        if not names:
            yield words
    return list(below())


def options_of(text):
    """In the list at the end of what --help prints."""
    return set(OPTION.findall(" ".join(re.findall(
        r"^  (?:-\w, )?(--[a-z-]+)", text, re.M))))


def items(pod):
    """The options that the page has an =item for."""
    return set(OPTION.findall(" ".join(re.findall(r"^=item (.*)$", pod,
                                                  re.M))))


wrong = []
offered = {page: {"--help", "--version"} for page in PAGES}
offered["nbdferry-backup"] = {"--help"}
all_commands = commands()
assert len(all_commands) > 15, all_commands
for words in all_commands:
    page = "nbdferry-backup" if words[0] in BACKUP else "nbdferry"
    pod = read(PAGES[page])
    known = items(pod)
    options = options_of(help_of(*words))
    assert "--help" in options, words
    offered[page] |= options
    if not re.search(r"^=head2 .*\b%s\b" % " ".join(words), pod, re.M):
        wrong.append("%s: no part about '%s'" % (page, " ".join(words)))
    wrong += ["%s: %s of '%s' is missing" % (page, o, " ".join(words))
              for o in sorted(options - known)]
for page, path in PAGES.items():
    wrong += ["%s: there is no option %s" % (page, o)
              for o in sorted(items(read(path)) - offered[page])]

# The plugin's parameters.
usage = subprocess.run(["nbdkit", "--dump-plugin", PLUGIN], text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                       env=dict(os.environ, LD_PRELOAD=PRELOAD)).stdout
assert "name=ferry" in usage, usage
usage = subprocess.run(["nbdkit", PLUGIN, "--help"], text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                       env=dict(os.environ, LD_PRELOAD=PRELOAD)).stdout
usage = usage[usage.index("disk="):]
pod = read("plugin/nbdkit-ferry-plugin.pod")
parameter = re.compile(r"\b([a-z][a-z-]*)=")
told = set(parameter.findall(" ".join(re.findall(r"^=item (.*)$",
                                                 re.sub("[A-Z]<|>", "", pod),
                                                 re.M))))
listed = set(re.findall(r"^ *\[?([a-z][a-z-]*)=", usage, re.M))
assert len(listed) > 4, usage
wrong += ["nbdkit-ferry-plugin: %s= is missing" % p
          for p in sorted(listed - told)]
wrong += ["nbdkit-ferry-plugin: --help does not have %s=" % p
          for p in sorted(told - listed)]

# The control socket: a row may stand for several: `a-b`, `-c` is a-b and a-c.
make_disk("disk.raw", 1 << 20)
daemon = Nbdkit("disk=disk.raw", "control=ctl")
qmp = QMP("ctl")
there = {c["name"] for c in qmp.command("query-commands")}
qmp.close()
daemon.stop()
page = read("docs/control.md")
rows = page.partition("\n## Commands\n")[2].strip().partition("\n\n")[0]
written = set()
for row in rows.splitlines()[2:]:
    names = re.findall(r"`([^`]+)`", row.lstrip("| ").partition("|")[0])
    written |= {names[0].rpartition("-")[0] + n if n[0] == "-" else n
                for n in names}
wrong += ["control.md: %s is missing" % c for c in sorted(there - written)]
wrong += ["control.md: there is no %s" % c for c in sorted(written - there)]

# Every document is reachable from the README, and every link leads somewhere.
readme = read("README.md")
docs = sorted(d for d in os.listdir(os.path.join(SRC, "docs"))
              if d.endswith(".md"))
wrong += ["README.md: no link to docs/%s" % d for d in docs
          if "(docs/%s)" % d not in readme]
for path in ["README.md"] + ["docs/" + d for d in docs]:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(path)):
        if not os.path.exists(os.path.join(SRC, os.path.dirname(path), link)):
            wrong.append("%s: a dead link: %s" % (path, link))

assert not wrong, "\n" + "\n".join(wrong)
