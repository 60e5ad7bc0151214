/* nbdferry - HELLO as part of an export's name
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * So that the session is open as soon as the export is: a round trip less.  The
 * packet stands there in the 64 letters of RFC 4648's base64url, unpadded.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "hello-name.h"

/* A name may have 4096 bytes. */
#define MAX_NAME 4096

static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                              "abcdefghijklmnopqrstuvwxyz"
                              "0123456789-_";

char *
hello_name (const char *disk, const uint8_t *packet, size_t len)
{
  size_t prefix = strlen (disk) + strlen ("@incoming/");
  uint32_t bits = 0;
  unsigned nr = 0;
  char *name, *to;

  if (prefix + (len * 4 + 2) / 3 > MAX_NAME)
    return NULL;
  name = malloc (prefix + (len * 4 + 2) / 3 + 1);
  if (name == NULL)
    return NULL;
  to = stpcpy (stpcpy (name, disk), "@incoming/");
  for (size_t i = 0; i < len; i++) {
    bits = bits << 8 | packet[i];
    for (nr += 8; nr >= 6; nr -= 6)
      *to++ = letters[bits >> (nr - 6) & 63];
  }
  if (nr > 0)
    *to++ = letters[bits << (6 - nr) & 63];
  *to = '\0';
  return name;
}

int
hello_name_open (struct incoming_channel *ch, const char *text,
                 struct error *err)
{
  CLEANUP_FREE uint8_t *packet = malloc (strlen (text) + PACKET_HEADER);
  struct packet_header h;
  uint32_t bits = 0;
  unsigned nr = 0;
  size_t len = 0;

  if (packet == NULL)
    return error_set (err, ENOMEM, "%m");
  for (; *text; text++) {
    const char *at = strchr (letters, *text);

    if (at == NULL)
      return error_set (err, EBADMSG, "malformed name of a channel");
    bits = bits << 6 | (at - letters);
    nr += 6;
    if (nr >= 8) {
      nr -= 8;
      packet[len++] = bits >> nr;
    }
  }
  if (packet_parse (packet, len, &h, err) == -1)
    return -1;
  if (h.type != PACKET_HELLO)
    return error_set (err, EBADMSG, "a channel's name with a packet that is "
                      "not HELLO");
  return incoming_packet (ch, packet, len, err);
}
