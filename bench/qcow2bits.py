# nbdferry - a qcow2 image with one bitmap, of bits of our choice
# SPDX-License-Identifier: BSD-3-Clause
"""Setting millions of bits by writes takes minutes, with QEMU or with us; both
read them from such an image in no time.  See docs/interop/qcow2.txt of QEMU.
"""

import struct

CLUSTER = 65536


def make(path, size, granularity, bits):
    """An image of that virtual size, without data, and the bitmap "b": 'bits'
    are its bytes, bit 0 first.
    """
    def clusters(n):
        return -(-n // CLUSTER)

    nr = clusters(len(bits))
    l1_entries = -(-size // (CLUSTER * CLUSTER // 8))
    tables = [clusters(l1_entries * 8), clusters(nr * 8)]
    # Header, refcount table, refcount blocks, L1, bitmap table, directory,
    # bitmap.
    blocks = 1
    while clusters(2 * (4 + blocks + sum(tables) + nr)) > blocks:
        blocks += 1
    l1 = 2 + blocks
    table = l1 + tables[0]
    directory = table + tables[1]
    first = directory + 1
    total = first + nr
    entry = struct.pack(">QIIBBHI", table * CLUSTER, nr, 2, 1,
                        granularity.bit_length() - 1, 1, 0) + b"b"
    entry += bytes(-len(entry) % 8)
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, len(entry),
                            directory * CLUSTER) + bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, size, 0, l1_entries,
        l1 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 1, 4, 104) + extension
    parts = [(0, header),
             (1, b"".join(struct.pack(">Q", (2 + i) * CLUSTER)
                          for i in range(blocks))),
             (2, struct.pack(">H", 1) * total),
             (table, b"".join(struct.pack(">Q", (first + i) * CLUSTER)
                              for i in range(nr))),
             (directory, entry), (first, bits)]
    with open(path, "wb") as f:
        for cluster, data in parts:
            f.seek(cluster * CLUSTER)
            f.write(data)
        f.truncate(total * CLUSTER)
