/work/main/hostsys/criu-preload/target/x86_64-unknown-linux-gnu/debug/deps/criu_preload-3086d3075eb4caf0.d: /work/main/clippy.toml src/lib.rs src/conntrack.rs src/limits.rs src/raw.rs Cargo.toml

/work/main/hostsys/criu-preload/target/x86_64-unknown-linux-gnu/debug/deps/libcriu_preload-3086d3075eb4caf0.rmeta: /work/main/clippy.toml src/lib.rs src/conntrack.rs src/limits.rs src/raw.rs Cargo.toml

/work/main/clippy.toml:
src/lib.rs:
src/conntrack.rs:
src/limits.rs:
src/raw.rs:
Cargo.toml:

# env-dep:CLIPPY_ARGS=
# env-dep:CLIPPY_CONF_DIR
