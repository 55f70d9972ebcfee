//! How long a freeze will be that copies so much memory: a line through measurements, meant to be right within a factor of two.
//!
//! Measured with CRIU 4.2 and runc 1.3 on a machine of two cores (`docs/measurements.md` repeats it): dump, copy and restore
//! each pass all memory once, one thread; runc's and CRIU's start, the mounts and the write of the decision are fixed.

/// Freezing, packets, the decision, the starts of runc and CRIU on both sides. On two busy cores 360 to 430 ms were seen for a
/// shell of 0.1 MiB, 640 to 870 ms for 64 MiB, 4.3 to 5.2 s for 1 GiB.
const BASE_MS: u64 = 250;
/// Mount tree, cgroup, images of one more container; two cores dump two at once.
const CONTAINER_MS: u64 = 60;
/// Dump and restore of a thread.
const THREAD_US: u64 = 1000;
/// Bytes in a millisecond for dump, copy through TLS, and restore together.
const BYTES_PER_MS: u64 = 350 << 10;

/// The prediction.
#[must_use]
pub fn predicted_milliseconds(memory_bytes: u64, threads: u64, containers: u64) -> u32 {
    let predicted = BASE_MS
        .saturating_add(containers.saturating_mul(CONTAINER_MS))
        .saturating_add(threads.saturating_mul(THREAD_US) / 1000)
        .saturating_add(memory_bytes / BYTES_PER_MS);
    u32::try_from(predicted).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_of_anything_takes_longer() {
        let small = predicted_milliseconds(64 << 20, 10, 1);
        assert!((100..1000).contains(&small), "{small}");
        assert!(predicted_milliseconds(1 << 30, 10, 1) > small);
        assert!(predicted_milliseconds(64 << 20, 1000, 1) > small);
        assert!(predicted_milliseconds(64 << 20, 10, 3) > small);
        assert_eq!(predicted_milliseconds(u64::MAX, u64::MAX, u64::MAX), u32::MAX);
    }
}
