#!/bin/sh
# Unpacks Debian's packages, and what they need that this machine lacks, into a folder. Nothing is installed, and no root is needed.
#
#   unpack_debian.sh FOLDER PROGRAM=PACKAGE...
#
# A program that the machine has already, or that was unpacked before, costs nothing. One that cannot be had is said in a
# line, and is no error: the tests that need it say so themselves (tests/support/debian.py).
set -u
folder=$1
shift
PATH="$PATH:/usr/sbin"

missing=
for pair in "$@"; do
  program=${pair%%=*}
  command -v "$program" >/dev/null || test -x "$folder/usr/bin/$program" || test -x "$folder/usr/sbin/$program" ||
    missing="$missing ${pair#*=}"
done
test -n "$missing" || exit 0
if ! command -v apt-get >/dev/null; then
  echo "not here, and no apt-get to fetch it:$missing"
  exit 0
fi

echo "==> fetching$missing into $folder"
# The lists of packages are read anew, into a folder of their own: the machine's may be old or empty.
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
mkdir -p "$folder" "$cache/lists/partial" "$cache/archives/partial"
apt="apt-get -qq -y -o APT::Sandbox::User=root -o Debug::NoLocking=1 -o Dir::State=$cache -o Dir::Cache=$cache \
  -o Dir::State::status=/var/lib/dpkg/status -o Acquire::Retries=1 -o Acquire::http::Timeout=20"
$apt update || echo "apt-get update failed"
for package in $missing; do
  if $apt --no-install-recommends --download-only install "$package" >"$cache/log" 2>&1; then
    for archive in "$cache"/archives/*.deb; do dpkg -x "$archive" "$folder" && rm "$archive"; done
  else
    tail -3 "$cache/log"
    echo "$package cannot be fetched; to run its tests: apt-get install $package"
  fi
done
