/* nbdferry - test of how much goes into a packet
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "clock.h"
#include "engine.h"
#include "room.h"

#define MiB   (UINT64_C (1) << 20)
#define MS    NS_PER_MS
#define BEGIN (100 * NS_PER_S)
#define LATER (110 * NS_PER_S)

/* The next packet, at that time; without a limit. */
static size_t
next (struct room *r, uint64_t now)
{
  return room_choose (r, false, SIZE_MAX, now);
}

/* A long way into the transfer. */
static struct room
later (unsigned channels, uint64_t rtt, uint64_t rate)
{
  return (struct room){ .channels = channels, .buffers = channels + 2,
                        .rtt = rtt, .rate = rate, .left = MiB << 20,
                        .taken = 1000, .first_ns = BEGIN };
}

static void
test_near (void **state)
{
  struct room r = later (4, MS / 10, 0);

  assert_int_equal (next (&r, LATER), ENGINE_PAYLOAD);
  r.rate = 3000 * MiB;
  assert_int_equal (next (&r, LATER), ENGINE_PAYLOAD);
  /* It gives way, while there is anybody to give way to. */
  r.giving_way = true;
  assert_int_equal (next (&r, LATER), ENGINE_PAYLOAD);
  r.clients_ns = LATER - NS_PER_S / 2;
  assert_int_equal (next (&r, LATER), ENGINE_PAYLOAD_WAY);
  assert_int_equal (next (&r, LATER + NS_PER_S), ENGINE_PAYLOAD);
  r.giving_way = false;
  assert_int_equal (next (&r, LATER), ENGINE_PAYLOAD);
  /* Slow: what is urgent waits behind it. */
  r.rate = 10 * MiB;
  assert_int_equal (room_choose (&r, true, SIZE_MAX, LATER), 64 << 10);
}

/* A gigabit and 50 ms: more than fills it is under way, and not much more. */
static void
test_far (void **state)
{
  for (unsigned channels = 4; channels <= 64; channels *= 2) {
    struct room r = later (channels, 50 * MS, 119 * MiB);
    uint64_t total = next (&r, LATER) * channels;

    assert_in_range (total, 2 * 6 * MiB, 3 * 6 * MiB);
    /* At first it is not known. */
    r.taken = 1000;
    r.rate = MiB;
    total = next (&r, BEGIN + MS) * channels;
    assert_in_range (total, 16 * MiB, 40 * MiB);
    /* Then it is: a slow one has no queue of minutes. */
    total = next (&r, LATER) * channels;
    assert_in_range (total, 64 << 10, channels * (64 << 10));
  }
}

static void
test_memory (void **state)
{
  for (unsigned channels = 1; channels <= 64; channels++) {
    struct room r = later (channels, 300 * MS, 10000 * MiB);
    size_t room = next (&r, LATER);

    assert_true (room <= ENGINE_PAYLOAD_MAX);
    assert_true (room * r.buffers <= 40 * MiB);
    assert_true (room >= 512 << 10);
  }
}

/* The first packets differ, the last ones become small. */
static void
test_ends (void **state)
{
  struct room r = later (16, 50 * MS, 0);
  size_t last = 0;

  r.taken = 0;
  for (unsigned i = 0; i < 16; i++) {
    size_t room = next (&r, BEGIN);

    assert_true (room > last);
    last = room;
  }
  r.left = 4 * MiB;
  assert_int_equal (next (&r, BEGIN), (4 * MiB) / 16 + (256 << 10));
  r.left = 0;
  assert_int_equal (next (&r, BEGIN), 256 << 10);
}

/* A round that begins with little goes evenly to all, over a long link. */
static void
test_share (void **state)
{
  struct room r = later (16, 50 * MS, 119 * MiB);

  r.left = r.round = MiB;
  assert_int_equal (next (&r, LATER), (64 << 10) + 4096);
  r.left = 4096;
  assert_int_equal (next (&r, LATER), (64 << 10) + 4096);
  r.round = 1;
  assert_int_equal (next (&r, LATER), 4096);
  /* Somebody waits for it; it began with more; there is no round. */
  assert_true (room_choose (&r, true, SIZE_MAX, LATER) >= 64 << 10);
  r.round = 16 * MiB;
  assert_int_equal (next (&r, LATER), 256 << 10);
  r.round = 0;
  assert_int_equal (next (&r, LATER), 256 << 10);
  r.rtt = MS / 10;
  r.round = 1;
  assert_int_equal (next (&r, LATER), 256 << 10);
}

static void
test_limit (void **state)
{
  struct room r = later (16, 50 * MS, 119 * MiB);

  assert_int_equal (room_choose (&r, false, 100000, LATER), 98304);
  assert_int_equal (room_choose (&r, false, 1, LATER), 4096);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_near),
    cmocka_unit_test (test_far),
    cmocka_unit_test (test_memory),
    cmocka_unit_test (test_ends),
    cmocka_unit_test (test_share),
    cmocka_unit_test (test_limit),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
