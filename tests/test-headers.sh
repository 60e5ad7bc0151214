#!/bin/bash
# nbdferry - every header compiles alone, and the arrows go one way
# SPDX-License-Identifier: BSD-3-Clause
#
# Headers are included by their names alone, so these must be unique; and a
# file includes only headers of its own folder or of a lower one.

source "$(dirname "$0")/functions.sh"

# Each may include what stands before it; on one line, none the others'.
layers=(
  common
  bitmap
  disk
  "store nbd"
  drive
  migrate
  backup
  "plugin cli"
)

declare -A folder               # of a header, by its name
includes=("-I$builddir")
for layer in "${layers[@]}"; do
  for dir in $layer; do
    includes+=("-I$srcdir/$dir")
    for h in "$srcdir/$dir"/*.h; do
      [ -f "$h" ] || continue
      name=${h##*/}
      [ -z "${folder[$name]-}" ] || fail "two headers have the name $name"
      folder[$name]=$dir
    done
  done
done

bad=0
for name in "${!folder[@]}"; do
  file=${folder[$name]}/$name
  printf '#include <config.h>\n#include "%s"\n' "$name" > alone.c
  # shellcheck disable=SC2086
  ${FERRY_CC:?} -std=gnu11 -fsyntax-only "${includes[@]}" alone.c ||
    { echo "$file does not compile alone"; bad=1; }
done

allowed=" "
for layer in "${layers[@]}"; do
  for dir in $layer; do
    for file in "$srcdir/$dir"/*.[ch]; do
      [ -f "$file" ] || continue
      while read -r name; do
        of=${folder[${name##*/}]-}
        [ -n "$of" ] || { echo "$dir/${file##*/}: no such header: $name"; bad=1; }
        case "$allowed$dir " in
          *" $of "*) ;;
          *) echo "$dir/${file##*/} includes $of/$name"; bad=1 ;;
        esac
      done < <(sed -n 's/^ *# *include *"\(.*\)".*/\1/p' "$file")
    done
  done
  allowed+="$layer "
done
exit $bad
