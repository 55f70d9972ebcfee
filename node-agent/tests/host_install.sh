# Runs as the first process of a machine of its own (mount, pid, net, UTS, IPC and cgroup namespaces): a real containerd that a
# loop restarts, as a supervisor does; the agent installs, installs again, undoes.
# $1 work folder, $2 Debian tree, $3 agent, $4 a program that stands for the wrapper, $5 CRIU as the agent's image has it
set -e
mount --make-rprivate /
mkdir -p "$1/upper" "$1/work" "$1/root" "$1/containerd" "$1/state"
R=$1/root
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$R"
mkdir -p "$R/old" "$R/var/lib/containerd" "$R/var/lib/peregrine" "$R/etc/containerd"
mount -t proc proc "$R/proc"
mount -t sysfs sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
mount -t tmpfs tmpfs "$R/run"
mount --rbind /dev "$R/dev"
# Overlay cannot be the upper layer of an overlay; and a state folder on a disk of its own is a mount point.
mount --bind "$1/containerd" "$R/var/lib/containerd"
mount --bind "$1/state" "$R/var/lib/peregrine"
cp "$3" "$R/node-agent"
cp "$4" "$R/peregrine-runc"
cp -r "$5" "$R/criu-of-the-image"
# In the place of the preload, which a machine that withholds CAP_SYS_RESOURCE must have; these calls of CRIU do without it.
touch "$R/limits.so"
cd "$R"
pivot_root . old
umount -l /old
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
config=/etc/containerd/config.toml
cat > $config <<END
version = 3
# a comment of the administrator
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "plain"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.plain]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.plain.options]
        BinaryName = "/usr/sbin/runc"
END
cp $config /run/before
(while true; do containerd --config $config >> /run/containerd.log 2>&1; echo started >> /run/starts; sleep 0.1; done) &
for _ in $(seq 100); do [ -S /run/containerd/containerd.sock ] && break; sleep 0.1; done

say() { echo "RESULT $*"; }
files() { find /opt/peregrine /run/peregrine /var/lib/peregrine /etc/containerd -type f 2>/dev/null | sort | tr '\n' ' '; }
starts() { wc -l < /run/starts 2>/dev/null || echo 0; }

/node-agent install && say installed "$(starts)"
grep -q 'BinaryName = "/opt/peregrine/bin/peregrine-runc"' /etc/containerd/conf.d/peregrine.toml && say handler
grep -q '"oci_runtime": "/usr/sbin/runc"' /opt/peregrine/etc/runtime.json && say below
/node-agent install && say again "$(starts)"
/node-agent uninstall && say undone "$(starts)"
cmp $config /run/before && say same
say left "$(files)"
/node-agent uninstall && say twice "$(starts)"
/node-agent install
echo '# added meanwhile' >> $config
/node-agent uninstall
(cat /run/before; echo '# added meanwhile') | cmp $config - && say kept
mkdir -p /run/peregrine/hand-off/some-pod
/node-agent uninstall || say waits
rm -r /run/peregrine/hand-off/some-pod
bundle=/run/containerd/io.containerd.runtime.v2.task/k8s.io/moved
/node-agent install
mkdir -p $bundle
echo '{"binary_name":"/opt/peregrine/bin/peregrine-runc"}' > $bundle/options.json
echo '{"annotations":{"io.kubernetes.cri.sandbox-namespace":"shop","io.kubernetes.cri.sandbox-name":"web"}}' > $bundle/config.json
/node-agent uninstall | grep -q shop/web && say named
[ -x /opt/peregrine/bin/peregrine-runc ] && [ -f /etc/containerd/conf.d/peregrine.toml ] && say stays
rm -r $bundle
/node-agent uninstall
say left "$(files)"
# CRIU: the node's own where it has one, else that of the image; an upgrade replaces it, and the undo takes it away.
used() { tr -d ' \n' < /opt/peregrine/etc/runtime.json | sed -n 's/.*"criu":"\([^"]*\)".*/\1/p'; }
probed() { /node-agent probe > /run/probe || cat /run/probe >&2; tr -d ' \n' < /run/probe | grep -o '"fromAgentImage":[a-z]*'; }
# `criu check` connects to itself.
ip link set lo up
mv /criu-of-the-image /criu
/node-agent install
say "the node's own: $(used) $(probed)"
mv /usr/sbin/criu /usr/sbin/criu.away
/node-agent install
first=$(used)
case $first in /opt/peregrine/criu/*/criu) say "the image's: $(probed)" ;; esac
echo >> /criu/libuuid.so.1
/node-agent install
[ "$(used)" != "$first" ] && [ ! -e "$first" ] && [ "$(ls /opt/peregrine/criu | wc -l)" = 1 ] && say "upgraded: $(probed)"
# One that is too old counts as none.
printf '#!/bin/sh\necho Version: 3.16.1\n' > /usr/sbin/criu
chmod +x /usr/sbin/criu
/node-agent install
say "too old: $(probed)"
mv /criu /criu-of-the-image
/node-agent install
/node-agent probe | grep -o 'CRIU is 3.16.1, too old' | sed 's/^/RESULT /'
rm /usr/sbin/criu
/node-agent install
/node-agent probe | grep -o 'CRIU is missing' | sed 's/^/RESULT /'
/node-agent uninstall
say left "$(files)"
