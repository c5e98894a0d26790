//! How much memory the machine has to give.

/// Bytes that programs can take without swapping; none: the kernel does not say.
pub fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_says_it() {
        assert!(super::available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
