//! What the processor offers to user space.

/// Size in bytes of the extended state (x87, SSE, AVX, …) that the kernel has switched on: an image that was taken with a
/// larger one cannot be restored. None where the architecture has no such thing.
#[must_use]
pub fn xsave_bytes() -> Option<u32> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Leaf 1, ECX bit 27 (OSXSAVE): the kernel has switched XSAVE on, so leaf 0xD speaks of what is in force.
        if __cpuid(0).eax < 0xd || __cpuid(1).ecx & (1 << 27) == 0 {
            return None;
        }
        // EBX of sub-leaf 0: size for the features that XCR0 has switched on now.
        Some(__cpuid_count(0xd, 0).ebx)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        None
    }
}

/// `x86_64`, `aarch64`, …
#[must_use]
pub fn architecture() -> &'static str {
    std::env::consts::ARCH
}
