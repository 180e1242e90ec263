#!/bin/sh
# install.sh install|uninstall   what `make install` and `make uninstall` do. Nothing is asked; everything lies below
# $DESTDIR$PREFIX but the configuration, which is written once and then belongs to the operator.
#
#   lib/flexpiped                a private environment of the daemon's dependencies, and its data; it may be moved with
#                                the rest, as nothing in it names the place where it was made
#   bin, share/man, share/doc, share/bash-completion, share/zsh, lib/systemd, lib/sysusers.d, lib/tmpfiles.d
#   $SYSCONFDIR/flexpiped/flexpiped.toml
#
# An installation that is there already is replaced once the new one is complete; if that fails, it stays as it is.
#
# PYTHON      the interpreter of that environment
# WITH        "native": also torch and transformers, so that one environment has the native engine, too
# PIP_FLAGS   further flags for pip
set -eu

: "${DESTDIR:=}" "${PREFIX:=/usr/local}" "${SYSCONFDIR:=/etc}" "${PYTHON:=python3}" "${WITH:=}" "${PIP_FLAGS:=}"
source=$(cd "$(dirname "$0")/.." && pwd)
root=$DESTDIR$PREFIX
place=$root/lib/flexpiped
venv=$place.new # until it is complete
config=$DESTDIR$SYSCONFDIR/flexpiped/flexpiped.toml

make_environment() {
    copy=$(mktemp -d) # setuptools builds beside the sources: not in the checkout
    trap 'rm -rf "$copy" "$venv"' EXIT
    rm -rf "$venv"
    "$PYTHON" -m venv "$venv"
    for name in pyproject.toml README.md LICENSE flexpiped engines planner topology; do
        cp -R "$source/$name" "$copy/"
    done
    if [ -n "$WITH" ]; then # torch by its exact version: where there is no GPU, that one is offered as a CPU build
        pip_install "$(grep '^torch==' "$source/etc/constraints.txt")"
    fi
    # shellcheck disable=SC2086  # flags are words
    pip_install $PIP_FLAGS --constraint "$source/etc/constraints.txt" "$copy${WITH:+[$WITH]}"
    "$venv/bin/python" -m pip --quiet uninstall --yes pip setuptools 2>/dev/null
}

pip_install() {
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-compile --no-warn-script-location "$@"
}

forget_the_place() {
    find "$venv/bin" -mindepth 1 ! -name 'python*' -delete
    sed -i '/^command = /d' "$venv/pyvenv.cfg"
    find "$venv" -name direct_url.json -path '*flexpiped*' -delete
    find "$venv" -name __pycache__ -prune -exec rm -rf {} +
    # Tracebacks name the place where it will be; files of tests may be no Python 3.
    "$venv/bin/python" -m compileall -q -j 0 -s "$venv" -p "$PREFIX/lib/flexpiped" "$venv/lib" || true
}

launcher() { # name module
    cat > "$venv/bin/$1" <<END
#!/bin/sh
'''exec' "\$(dirname "\$(readlink -f "\$0")")/python" -P "\$0" "\$@"
' '''
import sys

from $2 import main

sys.exit(main())
END
    chmod 755 "$venv/bin/$1"
    ln -sf "../lib/flexpiped/bin/$1" "$root/bin/$1"
}

install_data() {
    data=$venv/share/flexpiped
    mkdir -p "$data" "$root/share/doc/flexpiped"
    cp -R "$source/etc/demo-model" "$source/etc/topologies" "$source/etc/grafana" "$source/etc/prometheus" "$data/"
    install -m 644 "$source/etc/flexpiped.toml" "$source/etc/constraints.txt" "$data/"
    ln -sfn ../lib/flexpiped/share/flexpiped "$root/share/flexpiped"
    install -m 644 "$source/README.md" "$root/share/doc/flexpiped/README.md"
    install -m 644 "$source/LICENSE" "$root/share/doc/flexpiped/copyright"
    # Who may not read the directory is told nothing about a file in it; an old one stays as it is.
    [ -e "$config" ] || install -D -m 640 "$source/etc/flexpiped.toml" "$config"
}

install_for_shells() {
    mkdir -p "$root/share/man/man1" "$root/share/man/man8"
    "$venv/bin/python" -P -m flexpiped.flexctl.man_page flexctl > "$root/share/man/man1/flexctl.1"
    "$venv/bin/python" -P -m flexpiped.flexctl.man_page flexpiped > "$root/share/man/man8/flexpiped.8"
    bash=$root/share/bash-completion/completions zsh=$root/share/zsh/site-functions
    mkdir -p "$bash" "$zsh"
    "$venv/bin/flexctl" completion bash > "$bash/flexctl"
    "$venv/bin/flexctl" completion zsh > "$zsh/_flexctl"
}

take_the_place() { # whoever looks finds one that is complete; what runs keeps the files that it has opened
    rm -rf "$place.old"
    [ ! -e "$place" ] || mv "$place" "$place.old"
    mv "$venv" "$place"
    rm -rf "$place.old"
}

install_units() {
    units=$root/lib/systemd/system
    mkdir -p "$units"
    for name in flexpiped.service flexpiped-engine.socket flexpiped-engine@.service; do
        sed -e "s|/opt/flexpiped/|$PREFIX/|" -e "s|/etc/flexpiped/|$SYSCONFDIR/flexpiped/|" \
            "$source/systemd/$name" > "$units/$name"
    done
    install -D -m 644 "$source/systemd/flexpiped.sysusers.conf" "$root/lib/sysusers.d/flexpiped.conf"
    install -D -m 644 "$source/systemd/flexpiped.tmpfiles.conf" "$root/lib/tmpfiles.d/flexpiped.conf"
}

uninstall() {
    rm -rf "$place" "$place.old" "$venv" "$root/share/doc/flexpiped"
    rm -f "$root/bin/flexpiped" "$root/bin/flexctl" "$root/share/flexpiped" \
        "$root/share/man/man1/flexctl.1" "$root/share/man/man8/flexpiped.8" \
        "$root/share/bash-completion/completions/flexctl" "$root/share/zsh/site-functions/_flexctl" \
        "$root/lib/systemd/system/flexpiped.service" "$root/lib/systemd/system/flexpiped-engine.socket" \
        "$root/lib/systemd/system/flexpiped-engine@.service" "$root/lib/sysusers.d/flexpiped.conf" \
        "$root/lib/tmpfiles.d/flexpiped.conf"
    if cmp -s "$source/etc/flexpiped.toml" "$config"; then
        rm -f "$config"
        rmdir --ignore-fail-on-non-empty "$(dirname "$config")"
    elif [ -e "$config" ]; then
        echo "$config was changed, and stays"
    fi
    if [ -n "$DESTDIR" ]; then # a host keeps its /usr/local/bin, empty or not
        find "$DESTDIR" -mindepth 1 -type d -empty -delete
    fi
}

case ${1:-} in
install)
    mkdir -p "$root/bin" "$root/lib" "$root/share"
    make_environment
    forget_the_place
    launcher flexpiped flexpiped.__main__
    launcher flexctl flexpiped.flexctl.__main__
    install_data
    install_for_shells
    take_the_place
    install_units
    ;;
uninstall) uninstall ;;
*)
    echo "usage: install.sh install|uninstall" >&2
    exit 2
    ;;
esac
