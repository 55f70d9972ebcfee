//! Processor features that a running program may have come to rely on.

use crds::migration_node::CpuStatus;

/// Flags of `/proc/cpuinfo` that say something about the kernel, virtualization or power, not about instructions or
/// registers of user space: nodes of one kind differ in them, and no program can tell.
const NOT_FOR_PROGRAMS: &[&str] = &[
    "3dnowprefetch_hint",
    "acc_power",
    "acpi",
    "amd_dcm",
    "amd_lbr_pmc_freeze",
    "amd_lbr_v2",
    "amd_ppin",
    "aperfmperf",
    "arat",
    "arch_capabilities",
    "arch_lbr",
    "arch_perfmon",
    "art",
    "auto_ibrs",
    "auto-ibrs",
    "avic",
    "bhi_ctrl",
    "brs",
    "bts",
    "cat_l2",
    "cat_l3",
    "cdp_l2",
    "cdp_l3",
    "cmp_legacy",
    "constant_tsc",
    "core_capabilities",
    "cpb",
    "cppc",
    "cpuid",
    "cpuid_fault",
    "cqm",
    "cqm_llc",
    "cqm_mbm_local",
    "cqm_mbm_total",
    "cqm_occup_llc",
    "dca",
    "debug_swap",
    "decodeassists",
    "ds_cpl",
    "dtes64",
    "dtherm",
    "dts",
    "enqcmd",
    "epb",
    "ept",
    "ept_ad",
    "est",
    "extapic",
    "extd_apicid",
    "flexpriority",
    "flush_l1d",
    "flushbyasid",
    "fsrcr",
    "hfi",
    "hrs",
    "hw_pstate",
    "hwp",
    "hwp_act_window",
    "hwp_epp",
    "hwp_notify",
    "hwp_pkg_req",
    "hypervisor",
    "ibpb",
    "ibpb_brtype",
    "ibpb_exit_to_user",
    "ibrs",
    "ibrs_enhanced",
    "ibs",
    "ida",
    "intel_ppin",
    "intel_pt",
    "invpcid_single",
    "la57",
    "lbrv",
    "lmce",
    "machine_check",
    "mba",
    "mca",
    "mce",
    "md_clear",
    "monitorx_timer",
    "mtrr",
    "nonstop_tsc",
    "nonstop_tsc_s3",
    "nopl",
    "npt",
    "nrip_save",
    "nx_huge",
    "osvw",
    "overflow_recov",
    "pat",
    "pausefilter",
    "pbe",
    "pconfig",
    "pdcm",
    "pebs",
    "perfctr_core",
    "perfctr_llc",
    "perfctr_nb",
    "perfmon_v2",
    "pfthreshold",
    "pln",
    "proc_feedback",
    "pse_switch",
    "pti",
    "ptsc",
    "pts",
    "rapl",
    "rdt_a",
    "rep_good",
    "retbleed",
    "rsb_ctxsw",
    "rrsba_ctrl",
    "sbpb",
    "sev",
    "sev_es",
    "sev_snp",
    "sgx_lc",
    "skinit",
    "sme",
    "smca",
    "smep",
    "smap",
    "smx",
    "split_lock_detect",
    "srso",
    "ssbd",
    "stibp",
    "succor",
    "svm",
    "svm_lock",
    "tm",
    "tm2",
    "topoext",
    "tpr_shadow",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "tsc_reliable",
    "tsc_scale",
    "tsxldtrk_mitigation",
    "tm3",
    "tdx_guest",
    "tdx_host_platform",
    "user_shstk_off",
    "v_spec_ctrl",
    "v_vmsave_vmload",
    "vgif",
    "virt_ssbd",
    "vmcb_clean",
    "vmmcall",
    "vme",
    "vmx",
    "vnmi",
    "vpid",
    "wdt",
    "x2apic",
    "x2avic",
    "xtopology",
    "xtpr",
    "debug",
    "intel_stibp",
    "extended_sat",
    "zen",
    "fred",
    "ibt_kernel",
    "legacy_lbr",
    "clear_cpu_buf",
    "apic",
    "pge",
    "pse",
    "pse36",
    "pae",
    "mwaitx_timer",
    "invpcid",
    "pcid",
    "dbx",
    "bpext",
    "msr",
    "de",
    "ss",
    "ht",
    "cid",
];

/// Reads `/proc/cpuinfo`: of the first processor, because the kernel demands that all are alike in what programs see.
#[must_use]
pub fn parse(cpuinfo: &str, xsave_bytes: Option<u32>) -> CpuStatus {
    let field = |names: &[&str]| {
        cpuinfo
            .lines()
            .take_while(|line| !line.trim().is_empty())
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| names.contains(&name.trim()))
            .map(|(_, value)| value.trim())
            .unwrap_or_default()
    };
    // x86 says `flags`, arm64 `Features`.
    let mut features: Vec<String> = field(&["flags", "Features"])
        .split_whitespace()
        .filter(|flag| !NOT_FOR_PROGRAMS.contains(flag))
        .map(str::to_owned)
        .collect();
    features.sort();
    features.dedup();
    CpuStatus {
        model: field(&["model name", "CPU part"]).to_owned(),
        features,
        xsave_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_kept_and_the_kernels_business_is_not() {
        let text = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu vme sse2 avx512f pti ibrs hypervisor\n\nprocessor\t: 1\nflags\t\t: fpu\n";
        let cpu = parse(text, Some(2696));
        assert_eq!(cpu.model, "Xeon");
        assert_eq!(cpu.features, ["avx512f", "fpu", "sse2"]);
        assert_eq!(cpu.xsave_bytes, Some(2696));
    }

    #[test]
    fn arm_has_other_words() {
        let text = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd0c\n";
        let cpu = parse(text, None);
        assert_eq!(cpu.features, ["asimd", "fp", "sve"]);
        assert_eq!(cpu.model, "0xd0c");
    }
}
