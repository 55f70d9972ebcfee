//! How much memory checkpoints may use on this node.

/// Steps in which the limit is published: it follows the free memory, and not every page is worth a write.
const STEP: u64 = 64 << 20;

/// `MemAvailable` in bytes.
#[must_use]
pub fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The limit: a share of what is available, at most what the flag says.
#[must_use]
pub fn limit(available: u64, share_percent: u8, flag: Option<u64>) -> u64 {
    let share = available / 100 * u64::from(share_percent) + available % 100 * u64::from(share_percent) / 100;
    let limit = share.min(flag.unwrap_or(u64::MAX));
    if limit < STEP { limit } else { limit / STEP * STEP }
}

/// Whether a new limit is worth publishing: a difference of a tenth or more.
#[must_use]
pub fn differs(published: u64, now: u64) -> bool {
    published.abs_diff(now) > published / 10
}

/// The limit on this node now.
#[must_use]
pub fn limit_now(share_percent: u8, flag: Option<u64>) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    limit(available(&meminfo).unwrap_or(0), share_percent, flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_lesser_of_share_and_flag() {
        let gib = 1 << 30;
        assert_eq!(available("MemTotal: 1 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(limit(10 * gib, 50, None), 5 * gib / STEP * STEP);
        assert_eq!(limit(10 * gib, 50, Some(gib)), gib);
        assert_eq!(limit(1000, 50, None), 500);
        assert!(!differs(1000, 1050) && differs(1000, 1200) && differs(1000, 800));
    }
}
