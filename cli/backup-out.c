/* nbdferry - where a backup goes
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "backup-out.h"
#include "cleanup.h"
#include "identity.h"
#include "remote.h"

/* ---- names ---- */

/* A disk's name as a part of a file's: no slash, nothing that is hard to
 * type, and no dot in front.
 */
static void
put_node (FILE *f, const char *node)
{
  static const char plain[] = "abcdefghijklmnopqrstuvwxyz"
                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                              "0123456789-._~";

  for (const char *p = node; *p; p++) {
    if (strchr (plain, *p) && !(p == node && *p == '.'))
      fputc (*p, f);
    else
      fprintf (f, "%%%02X", (unsigned char) *p);
  }
}

static void
put_time (FILE *f)
{
  time_t now = time (NULL);
  char text[32] = "";
  struct tm tm;

  if (gmtime_r (&now, &tm))
    strftime (text, sizeof text, "%Y%m%dT%H%M%SZ", &tm);
  fputs (text, f);
}

/* Returns whether the disk's name is in it. */
static bool
expand (FILE *f, const char *pattern, const char *node)
{
  bool named = false;

  for (const char *p = pattern; *p; p++) {
    if (*p == '%' && p[1] == 'n') {
      put_node (f, node);
      named = true;
      p++;
    }
    else if (*p == '%' && p[1] == 't') {
      put_time (f);
      p++;
    }
    else {
      /* In a URI a percent sign means what it means there. */
      fputc (*p, f);
      if (*p == '%' && p[1] == '%' && !remote_is_uri (pattern))
        p++;
    }
  }
  return named;
}

static bool
is_folder (const char *path)
{
  struct stat st;

  return stat (path, &st) == 0 && S_ISDIR (st.st_mode);
}

char *
out_name (const char *pattern, const char *node, bool several,
          enum out_format format, struct error *err)
{
  char *name = NULL;
  size_t len;
  FILE *f = open_memstream (&name, &len);
  bool named;

  if (f == NULL) {
    error_set (err, errno, "%m");
    return NULL;
  }
  if (!remote_is_uri (pattern) && is_folder (pattern)) {
    fprintf (f, "%s/", pattern);
    named = expand (f, format == OUT_RAW ? "%n.raw" : "%n-%t" ARCHIVE_SUFFIX,
                    node);
  }
  else
    named = expand (f, pattern, node);
  if (fclose (f) != 0)
    error_set (err, errno, "%m");
  else if (several && !named)
    error_set (err, EINVAL, "several disks need several files: have %%n in "
               "'%s', or give a folder", pattern);
  else
    return name;
  free (name);
  return NULL;
}

/* ---- what it is ---- */

int
out_prepare (struct out *o, char *path, enum out_format format, bool force,
             struct error *err)
{
  struct stat st;
  bool uri = remote_is_uri (path);
  bool device = !uri && stat (path, &st) == 0 && S_ISBLK (st.st_mode);

  *o = (struct out){ .path = path, .partial = PARTIAL_NONE,
                     .target.partial = PARTIAL_NONE };
  o->archive = format == OUT_ARCHIVE ||
               (format == OUT_AUTO && !uri && !device);
  if (o->archive && (uri || device))
    return error_set (err, EINVAL, "%s cannot hold an archive, which is a file "
                      "or a stream", path);
  if (!o->archive && strcmp (path, "-") == 0)
    return error_set (err, EINVAL, "only an archive can go to standard "
                      "output");
  return o->archive ? partial_open (&o->partial, path, force, err) : 0;
}

/* A server may have the very disk that is backed up. */
static int
refuse_itself (const char *where, struct backup_session *s,
               const struct backup_disk *d, struct error *err)
{
  const json_t *uris;
  struct uuid there, own;
  int r = identity_ask (where, NULL, IDENTITY_HOPS, NULL, &there, err);

  if (r != 1)
    return r;
  uris = session_uris (s, err);
  if (uris == NULL)
    return -1;
  r = 0;
  /* An address that does not answer, who reads from there will complain of. */
  for (size_t i = 0; r != 1 && i < json_array_size (uris); i++) {
    const char *uri = json_string_value (json_array_get (uris, i));

    if (uri)
      r = identity_ask (uri, d->node, IDENTITY_HOPS, NULL, &own, err);
  }
  return r == 1 && uuid_equal (&there, &own)
           ? error_set (err, EINVAL, "%s: is the disk itself", where) : 0;
}

int
out_begin (struct out *o, struct backup_session *s,
           const struct backup_disk *d, bool force, unsigned connections,
           struct error *err)
{
  struct target_options opt = {
    .where = o->path,
    .size = d->head.size,
    .connections = connections,
    .in_place = !d->full,
    .overwrite = force,
  };

  if (!o->archive && remote_is_uri (o->path) &&
      refuse_itself (o->path, s, d, err) == -1)
    return -1;
  if (!o->archive)
    return target_open (&o->target, &opt, err);
  o->writer = archive_writer_open (o->partial.fd, o->path, &d->head, err);
  return o->writer ? 0 : -1;
}

int
out_commit (struct out *o, struct error *err)
{
  int r = o->archive ? partial_commit (&o->partial, err)
                     : target_commit (&o->target, err);

  o->complete = r == 0;
  return r;
}

void
out_close (struct out *o)
{
  archive_writer_free (o->writer);
  partial_drop (&o->partial);
  target_close (&o->target);
  free (o->path);
  *o = (struct out){ .partial = PARTIAL_NONE, .target.partial = PARTIAL_NONE };
}
