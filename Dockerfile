# docker buildx build --platform linux/amd64,linux/arm64 --target operator   --tag REGISTRY/operator:TAG   --push .
# docker buildx build --platform linux/amd64,linux/arm64 --target node-agent --tag REGISTRY/node-agent:TAG --push .
#
# All that is run runs on the builder's own architecture, and compiles or unpacks for the target's: under emulation it would
# take an hour.
FROM --platform=$BUILDPLATFORM docker.io/library/rust:1.95.0-trixie AS build
ARG BUILDARCH TARGETARCH
# The image's own: rust-toolchain.toml would have rustup fetch the lints and the formatter too.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /source
# Programs are static, so the target's static C library is needed beside its linker.
RUN set -eu; \
    case "$TARGETARCH" in \
      amd64) tuple=x86_64-unknown-linux-gnu; linker=x86_64-linux-gnu-gcc; package=gcc-x86-64-linux-gnu ;; \
      arm64) tuple=aarch64-unknown-linux-gnu; linker=aarch64-linux-gnu-gcc; package=gcc-aarch64-linux-gnu ;; \
      *) echo "there is no Peregrine for $TARGETARCH; use amd64 or arm64" >&2; exit 1 ;; \
    esac; \
    if [ "$TARGETARCH" = "$BUILDARCH" ]; then \
      linker=gcc; \
    else \
      apt-get update; \
      apt-get install --yes --no-install-recommends "$package" "libc6-dev-$TARGETARCH-cross"; \
    fi; \
    upper=$(echo "$tuple" | tr a-z- A-Z_); \
    printf 'export CARGO_BUILD_TARGET=%s\nexport CC_%s=%s\nexport CARGO_TARGET_%s_LINKER=%s\n' \
      "$tuple" "$(echo "$tuple" | tr - _)" "$linker" "$upper" "$linker" > /target.env; \
    rustup target add "$tuple"
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,id=peregrine-$TARGETARCH,target=/target \
    set -eu; . /target.env; \
    cargo build --locked --release --target-dir /target --package operator --package node-agent --package runtime; \
    mkdir /out; \
    for program in operator node-agent peregrine-runc; do \
      cp "/target/$CARGO_BUILD_TARGET/release/$program" /out/; \
    done; \
    # Loaded into CRIU, which is linked dynamically.
    RUSTFLAGS="-C target-feature=-crt-static" \
      cargo build --locked --release --target-dir /target/criu-preload --manifest-path hostsys/criu-preload/Cargo.toml; \
    cp "/target/criu-preload/$CARGO_BUILD_TARGET/release/libcriu_preload.so" /out/limits.so

# CRIU for nodes that have none: Debian's packages, of the suite and (at least) the version that the scenarios run with.
FROM --platform=$BUILDPLATFORM docker.io/library/debian:forky-slim AS criu
ARG TARGETARCH
ARG CRIU_VERSION=4.2.1
COPY node-agent/criu-bundle.sh /
RUN set -eu; \
    apt-get update; \
    apt-get install --yes --no-install-recommends binutils; \
    # As if this were a machine of the target's architecture with nothing installed: all packages that CRIU needs come.
    mkdir -p /packages/partial /lists/partial /tree /out/licenses; : > /nothing; \
    of_target() { \
      apt-get -o "APT::Architecture=$TARGETARCH" -o "APT::Architectures=$TARGETARCH" -o Dir::State::status=/nothing \
        -o Dir::State::lists=/lists -o Dir::Cache::archives=/packages -o Acquire::Languages=none "$@"; \
    }; \
    of_target update; \
    of_target install --download-only --yes --no-install-recommends criu; \
    version=$(dpkg-deb --field /packages/criu_*.deb Version); \
    if dpkg --compare-versions "$version" lt "$CRIU_VERSION" || [ "${version%%.*}" != "${CRIU_VERSION%%.*}" ]; then \
      echo "Debian has CRIU $version; this needs $CRIU_VERSION or a newer one of the same major version" >&2; exit 1; \
    fi; \
    for package in /packages/*.deb; do dpkg-deb --extract "$package" /tree; done; \
    sh /criu-bundle.sh /tree /out/criu; \
    for folder in /tree/usr/share/doc/*/; do \
      if [ -f "$folder/copyright" ]; then cp "$folder/copyright" "/out/licenses/$(basename "$folder")"; fi; \
    done

FROM scratch AS operator
COPY --from=build /out/operator /operator
USER 65532:65532
ENTRYPOINT ["/operator"]

FROM scratch AS node-agent
# The agent installs the wrapper on its node from here, and CRIU where the node has none.
COPY --from=build /out/node-agent /out/peregrine-runc /out/limits.so /
COPY --from=criu /out /
ENTRYPOINT ["/node-agent"]
