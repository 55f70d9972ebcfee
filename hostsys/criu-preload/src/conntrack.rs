//! CRIU's question for the connection tracking table of a pod.
//!
//! For each network namespace CRIU asks for the whole table, twice. The kernel keeps one table for all namespaces and walks all
//! of it, 20 ms each time on a small machine, inside the freeze. Nothing of it is of use: a moved pod has another address, and
//! drops all packets meanwhile. So the question becomes one that the kernel answers at once with "done".

/// `struct nlmsghdr`.
#[repr(C)]
pub(crate) struct Header {
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    pub(crate) pid: u32,
}

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`, which no other family of netlink that CRIU uses has.
const CONNTRACK_GET: u16 = 0x101;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_NOOP: u16 = 1;
/// With a `struct nfgenmsg` behind the header.
pub(crate) const LEN: u32 = 20;

/// Makes the question for the whole table one for nothing; every other is left as it is.
pub(crate) fn ask_for_nothing(header: &mut Header) {
    if header.kind == CONNTRACK_GET && header.flags == NLM_F_REQUEST | NLM_F_DUMP && header.len == LEN {
        header.kind = NLMSG_NOOP;
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u16, flags: u16) -> Header {
        Header {
            len: LEN,
            kind,
            flags,
            seq: 24680,
            pid: 0,
        }
    }

    #[test]
    fn only_the_dump_of_the_table_is_replaced() {
        let mut dump = header(CONNTRACK_GET, NLM_F_REQUEST | NLM_F_DUMP);
        ask_for_nothing(&mut dump);
        assert_eq!(
            (dump.kind, dump.flags, dump.seq),
            (NLMSG_NOOP, NLM_F_REQUEST | NLM_F_ACK, 24680)
        );
        for (kind, flags) in [(0x12, NLM_F_REQUEST | NLM_F_DUMP), (CONNTRACK_GET, NLM_F_REQUEST)] {
            let mut other = header(kind, flags);
            ask_for_nothing(&mut other);
            assert_eq!((other.kind, other.flags), (kind, flags));
        }
    }
}
