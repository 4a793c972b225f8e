#!/usr/bin/env bash
# Runs the README's commands on a machine that has nothing: a Debian made by debootstrap, in a folder.
#
#     tests/fresh_machine.sh SUITE FOLDER [TARGET...]       as root, on Debian with debootstrap
#
# SUITE: trixie (Debian 13, Python 3.13) or forky (the next one, Python 3.14). FOLDER: where the root
# is made, or was made before; it needs 6 GB. TARGET: of make, by default demo and test; or wheel,
# which builds an sdist, from it a wheel, and installs and uses both in empty environments; or, alone
# in a folder of its own, colab, which runs the notebook in a runtime like Colab's (colab_runtime.py).
# MIRROR: where Debian's packages come from, if not debootstrap's default.
set -euo pipefail
suite=${1:?SUITE} root=${2:?FOLDER}
shift 2
targets=("$@")
(($#)) || targets=(demo test)
cd "$(dirname "$0")/.."

if [[ ! -e $root/etc/debian_version ]]; then
  script=/usr/share/debootstrap/scripts/$suite # older debootstraps do not know newer suites
  [[ -e $script ]] || script=/usr/share/debootstrap/scripts/sid
  debootstrap --variant=minbase --include=ca-certificates,git,make,python3,python3-venv \
    "$suite" "$root" "${MIRROR:-}" "$script"
fi
# How this machine reaches the network, and the files that git knows, over those of an earlier call.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [[ ! -e $file ]] || install -D "$file" "$root$file"
done
mkdir -p "$root/nvg_jax"
git ls-files --cached --others --exclude-standard -z |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory="$root/nvg_jax"
# As in a clone: launchers and the sdist take what git knows.
git init --quiet "$root/nvg_jax"
git -C "$root/nvg_jax" add --all
git -C "$root/nvg_jax" -c user.name=test -c user.email=test@localhost commit --quiet --allow-empty \
  --message="The working tree"

# Away from the clone: nothing of it may be found.
# shellcheck disable=SC2016
export wheel='
  cd "$(mktemp --directory)"
  python3 -m venv build
  build/bin/pip install --quiet build
  build/bin/python -m build --outdir=dist /nvg_jax >/dev/null
  python3 -m venv plain
  plain/bin/pip install --quiet dist/*.whl
  plain/bin/pip check
  plain/bin/nvg sample --workdir=fashion_mnist --per_class=1 --out=clothes
  test -s clothes/grid.png
  if plain/bin/nvg train --config=digits:runlocal --workdir=runs/digits; then exit 1; fi
  plain/bin/pip install --quiet "$(ls dist/*.whl)[train]"
  plain/bin/pip check
  plain/bin/nvg train --config=digits:runlocal --workdir=runs/digits
  plain/bin/nvg sample --workdir=runs/digits --per_class=1 --out=digits
  test -s digits/grid.png
  tar --extract --file="$(ls dist/*.tar.gz)"
  cd nvg_jax-*/
  ../plain/bin/pip install --quiet --editable ".[test]"
  ../plain/bin/python -m pytest -q tests/test_hub.py tests/test_flow.py tests/test_parity.py
'

# In a mount namespace of its own, so that nothing stays mounted.
# shellcheck disable=SC2016
unshare --mount bash -euc '
  root=$1; shift
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
  for target; do
    command=(make -C /nvg_jax "$target")
    [[ $target != colab ]] || command=(python3 -u /nvg_jax/tests/colab_runtime.py)
    [[ $target != wheel ]] || command=(bash -euxc "$wheel")
    chroot "$root" env --ignore-environment HOME=/root LANG=C.UTF-8 PATH=/usr/bin:/usr/sbin \
      "${command[@]}"
  done
' bash "$root" "${targets[@]}"
