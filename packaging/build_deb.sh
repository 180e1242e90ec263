#!/bin/sh
# build_deb.sh OUT   what `make deb` does: builds a Debian package for this machine's Debian and writes it into OUT. It holds
# the code and a private environment of the daemon's dependencies, so that installing it downloads nothing. Engines are
# in environments of their own, which the configuration names.
set -eu

: "${PYTHON:=/usr/bin/python3}" # Debian's own, which the package depends on
out=$1
packaging=$(cd "$(dirname "$0")" && pwd)
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
chmod 755 "$staging"

DESTDIR=$staging PREFIX=/usr SYSCONFDIR=/etc PYTHON=$PYTHON WITH='' "$packaging/install.sh" install
gzip -9n "$staging/usr/share/man/man1/flexctl.1" "$staging/usr/share/man/man8/flexpiped.8"

version=$("$staging/usr/bin/flexctl" --version | cut -d' ' -f2)
architecture=$(dpkg --print-architecture)
series=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
next=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1] + 1}")')

mkdir "$staging/DEBIAN"
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@PYTHON@/$series/" -e "s/@NEXT_PYTHON@/$next/" \
    -e "s/@SIZE_KIB@/$(du -sk "$staging" | cut -f1)/" "$packaging/debian/control.in" > "$staging/DEBIAN/control"
echo /etc/flexpiped/flexpiped.toml > "$staging/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 "$packaging/debian/$script" "$staging/DEBIAN/$script"
done

mkdir -p "$out"
package=$out/flexpiped_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zzstd -z3 --build "$staging" "$package" > /dev/null
echo "$package"
