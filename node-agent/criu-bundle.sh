#!/bin/sh
# criu-bundle.sh TREE OUT: CRIU, every library that it needs and their loader, from an unpacked Debian tree into one folder.
#
# With a loader and a C library of its own it runs on every node, whatever the node is made from; nothing of it is looked for
# outside of its folder. Any architecture: nothing of the tree is executed.
set -eu
tree=$1 out=$2
command -v readelf > /dev/null || { echo "readelf (of binutils) is needed" >&2; exit 1; }
mkdir -p "$out"

# What a tree has under a name, whichever of the merged folders it lies in; libraries are found by their file's name alone.
of_tree() {
  for folder in "$tree"/usr/lib/*-linux-gnu* "$tree"/lib/*-linux-gnu* "$tree"/usr/lib64 "$tree"/usr/lib; do
    if [ -f "$folder/$1" ]; then
      echo "$folder/$1"
      return
    fi
  done
  echo "$tree has no $1, which CRIU needs" >&2
  exit 1
}

cp "$tree/usr/sbin/criu" "$out/criu"
loader=$(readelf --program-headers "$out/criu" | sed -n 's/.*program interpreter: \(.*\)]/\1/p')
from=$(of_tree "${loader##*/}")
cp -L "$from" "$out/loader"

waiting=$out/criu
while [ -n "$waiting" ]; do
  found=
  for file in $waiting; do
    for library in $(readelf --dynamic "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)]/\1/p'); do
      if [ "$library" = "${loader##*/}" ] || [ -e "$out/$library" ]; then
        continue
      fi
      from=$(of_tree "$library")
      cp -L "$from" "$out/$library"
      found="$found $out/$library"
    done
  done
  waiting=$found
done
chmod 0755 "$out"/*
