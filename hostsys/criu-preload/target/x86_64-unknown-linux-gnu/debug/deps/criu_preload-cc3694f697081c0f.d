/work/main/hostsys/criu-preload/target/x86_64-unknown-linux-gnu/debug/deps/criu_preload-cc3694f697081c0f.d: src/lib.rs src/conntrack.rs src/limits.rs src/raw.rs

/work/main/hostsys/criu-preload/target/x86_64-unknown-linux-gnu/debug/deps/criu_preload-cc3694f697081c0f: src/lib.rs src/conntrack.rs src/limits.rs src/raw.rs

src/lib.rs:
src/conntrack.rs:
src/limits.rs:
src/raw.rs:
